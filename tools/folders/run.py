"""One picture after the other: each is made, recorded and told of; a bad one does not stop the rest."""

import argparse
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from msbd.files import remove_leftovers

from .._cli import as_typed, expected_failure, print_notes
from .manifest import Manifest, Record, settings_hash, still_holds
from .tasks import Task, find_tasks
from .tool import Opening, Tool, attempt, error_line, warnings_told


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with 2 where the options for many pictures contradict each other."""
    if args.image is None and args.jobs is None:
        parser.error("one of the arguments -i/--image --jobs is required")
    if args.ray is not None and args.workers > 1:
        parser.error("argument --ray: not allowed with argument --workers; Ray has its own number of them")


def carry_out(opening: Opening, kind: type[Tool]) -> None:
    """Do what a command line asks for, with one picture or with many.

    ValueError or OSError, also where only some of many pictures failed.
    """
    args = opening.args
    many = args.jobs is not None or args.image.is_dir()
    tasks, notes = find_tasks(args) if many else ([kind.one_task(args)], _for_many(args))
    tool = kind(args)
    print_notes([*notes, *tool.notes], quiet=args.quiet)
    if args.dry_run:
        failed = _describe(args, tool, tasks, many=many)
    elif many:
        failed = make_all(opening, tool, tasks)
    else:
        failed = 0
        if not (args.skip_existing and tasks[0].output.exists()):
            tell = partial(print_notes, quiet=args.quiet)
            with warnings_told(tell):
                made = tool.make(tasks[0], tell)
            if not args.quiet:
                print("\n".join(made.lines))
    if failed:
        raise ValueError(f"{failed:,} of {len(tasks):,} pictures failed; see above")


def _for_many(args: argparse.Namespace) -> list[str]:
    """A note on the options that mean nothing for one picture."""
    given = {
        "--recursive": args.recursive, "--format": args.format != "png", "--resume": args.resume,
        "--shard": args.shard, "--workers": args.workers > 1, "--ray": args.ray is not None,
    }  # fmt: skip
    flags = ", ".join(flag for flag, there in given.items() if there)
    return [f"{flags}: not used for one picture, but for folders and lists"] if flags else []


def _describe(args: argparse.Namespace, tool: Tool, tasks: Sequence[Task], *, many: bool) -> int:
    """Print what would be done; the number of pictures that cannot be made."""
    if args.skip_existing:
        tasks = [task for task in tasks if not task.output.exists()]
    evaluations, failed = 0, 0
    for number, task in enumerate(tasks, 1):
        try:
            if task.error:
                raise ValueError(task.error)
            planned = tool.plan(task)
        except Exception as error:
            message = expected_failure(error, tool.memory)
            if message is None or args.debug or not many:
                raise
            failed += 1
            line = as_typed(error_line(error, task, tool.memory))
            print(f"{number}/{len(tasks)} error: {line}", file=sys.stderr)
            continue
        evaluations += planned.evaluations
        print_notes(planned.notes, quiet=args.quiet)
        print(f"{number}/{len(tasks)} {planned.line}" if many else "\n".join(planned.lines or [planned.line]))
    print(tool.summary(evaluations))
    return failed


def make_all(opening: Opening, tool: Tool, tasks: Sequence[Task]) -> int:
    """Make the pictures of a folder, as `opening.args` say; how many failed. OSError for the manifest's.

    What --resume or --skip-existing finds done is left.
    """
    from .on_ray import take_over

    args = opening.args
    args.output.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(args.output, "{}-of-{}".format(*args.shard) if args.shard else "")
    take_over(manifest)
    waiting = _waiting(args, tool, tasks, manifest)
    folders = dict.fromkeys(path.parent for task in waiting for path in task.files)
    if removed := remove_leftovers(dict.fromkeys([args.output, *folders])):
        print_notes(
            [f"{args.output}: {removed} unfinished files of a run that was ended removed"], quiet=args.quiet
        )
    if not args.quiet and len(waiting) < len(tasks):
        print(f"{len(tasks) - len(waiting):,} of {len(tasks):,} pictures are there already")
    unlisted = {task.name for task in waiting if task.folder}
    failed: list[Record] = []
    started, done = time.perf_counter(), 0
    try:
        with closing(_records(opening, tool, tasks, waiting, manifest)) as records:
            for record in records:
                failed += [] if record.done else [record]  # told also where the manifest cannot be written
                if record.path not in unlisted:  # else it would stay there as failed, once it can be listed
                    manifest.add(record)
                done += 1
                left = (time.perf_counter() - started) / done * (len(waiting) - done)
                _tell(record, f"{done}/{len(waiting)}", left, quiet=args.quiet)
    except KeyboardInterrupt:
        print(f"{done:,} of {len(waiting):,} pictures tried; --resume goes on from there", file=sys.stderr)
        raise
    finally:
        for record in failed:
            print(f"error: {as_typed(record.error or '')}", file=sys.stderr)
    return len(failed)


def _waiting(args: argparse.Namespace, tool: Tool, tasks: Sequence[Task], manifest: Manifest) -> list[Task]:
    """The tasks that are not done yet, as far as the command line lets that count."""
    if args.skip_existing:
        tasks = [task for task in tasks if not task.output.exists()]
    if not args.resume:
        return list(tasks)
    records = manifest.read()
    if manifest.damaged:
        note = (
            f"{manifest.folder}: {manifest.damaged} lines of the manifest are cut off, and tell of no picture"
        )
        print_notes([note], quiet=args.quiet)

    def holds(task: Task) -> bool:
        record = records.get(task.name)
        if record is None or not record.done or task.error:
            return False
        return still_holds(record, task, settings_hash(tool.settings(task)), args.output)

    return [task for task in tasks if not holds(task)]


def _records(
    opening: Opening, tool: Tool, tasks: Sequence[Task], waiting: Sequence[Task], manifest: Manifest
) -> Generator[Record]:
    """What becomes of each of the `waiting` among `tasks`, in whatever order they are finished."""
    args = opening.args
    if args.ray is not None and waiting:
        from .on_ray import records

        yield from records(opening, tasks, waiting, manifest)
    elif args.workers > 1 and len(waiting) > 1:
        from .workers import records

        yield from records(opening, waiting, min(args.workers, len(waiting)))
    else:
        for number, task in enumerate(waiting, 1):
            tool.part = f"{number}/{len(waiting)} "
            yield attempt(tool, task, args)


def _tell(record: Record, number: str, left: float, *, quiet: bool) -> None:
    """A line of what became of a picture, and how long the others will take."""
    if quiet:
        return
    name = Path(record.path).name
    print_notes((note if name in note else f"{record.path}: {note}" for note in record.notes), quiet=False)
    more = f"; {_duration(left)} left" if left >= 1 else ""
    told = record.made if record.done else f"failed: {as_typed(record.error or '')}"
    print(f"{number} {told}, {record.seconds:.1f} s{more}")


def _duration(seconds: float) -> str:
    """A time in words, not more exact than it is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
