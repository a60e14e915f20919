"""What runs inside Ray: one process that shares the pictures out, and the actors that make them.

Ray's checkpoint says which pictures are left out: at first those that are done already, then each that is
made. An actor that dies is replaced, its picture tried once more. The machines of a cluster, which
RAY_ADDRESS names, have the pictures, the models and this checkout at the same places.

Source   Ray Data 2.60: `map_batches` with a class, `CheckpointConfig`
"""

import os
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._cli import ROOT
from .manifest import Manifest
from .tasks import Task
from .tool import Opening, Tool, attempt, error_line, failed
from .workers import TRIES, end_with_parent

if TYPE_CHECKING:
    import pyarrow as pa

# Read when Ray is imported: no statistics are sent, and what it starts without a GPU sees none.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Pictures that an actor has: one that waits for another would die with it, and be tried less often.
IN_FLIGHT = 1
FILTER = 64 * 2**20  # bytes that Ray keeps free for the names of what is done, in place of 1 GiB


def share_out(
    opening: Opening,
    tasks: Sequence[Task],
    done: Sequence[Task],
    folder: Path,
    prefix: str,
    outcome: Connection,
) -> None:
    """A process: has Ray make the `tasks` that are not `done`, working in `folder`; `outcome` is then sent
    what went wrong, or "". The manifests of the actors begin with `prefix`.
    """
    end_with_parent()
    if not opening.args.debug:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        _share_out(opening, tasks, done, folder, prefix)
    except Exception as error:
        outcome.send(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise
    outcome.send("")


def _share_out(
    opening: Opening, tasks: Sequence[Task], done: Sequence[Task], folder: Path, prefix: str
) -> None:
    os.environ |= SETTINGS
    import pyarrow as pa
    import ray
    from pyarrow import parquet
    from ray.data.block import BlockMetadata
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.datasource import Datasource, ReadTask

    class Pictures(Datasource):
        """Each in a block of its own: what is retried, and what the checkpoint counts."""

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            tables = [pa.table({"path": [id_of(task)], "task": [pickle.dumps(task)]}) for task in tasks]
            return [ReadTask(lambda table=table: [table], _size(table), table.schema) for table in tables]

        def estimate_inmemory_data_size(self) -> None:
            return None

    def _size(table: pa.Table) -> BlockMetadata:
        return BlockMetadata(1, table.nbytes, exec_stats=None, input_files=None, task_exec_stats=None)

    actors, gpus = _start(opening.args)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    if done:
        parquet.write_table(pa.table({"path": [id_of(task) for task in done]}), checkpoint / "done.parquet")
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0 if opening.args.debug else -1  # pictures whose actor died each time
    config = CheckpointConfig("path", str(checkpoint), delete_checkpoint_on_success=False)
    config.checkpoint_actor_pool_max_size, config.checkpoint_actor_memory_bytes = 1, FILTER
    context.checkpoint_config = config
    made = ray.data.read_datasource(Pictures(), override_num_blocks=len(tasks)).map_batches(
        Maker,
        fn_constructor_args=(opening, prefix, os.getcwd(), torch.get_num_threads()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=1,
        num_gpus=min(1.0, gpus / actors),
        max_task_retries=TRIES - 1,
    )
    # Its names go into the checkpoint. Writing takes no slot from the actors.
    made.write_json(str(folder / "made"), ray_remote_args={"num_cpus": 0})
    ray.shutdown()


def _start(args: Any) -> tuple[int, int]:
    """Start Ray, or join a cluster; how many actors there are to be, and GPUs."""
    import ray

    surroundings = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}}
    with_gpus = args.device in ("auto", "cuda")
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env=surroundings)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if with_gpus else 0
        return args.ray or gpus or len(ray.nodes()), gpus
    gpus = torch.cuda.device_count() if with_gpus else 0
    actors = args.ray or gpus or 1
    # Two more slots, for reading the list and for the checkpoint's filter.
    ray.init(address="local", num_cpus=actors + 2, include_dashboard=False, runtime_env=surroundings)
    return actors, gpus


def id_of(task: Task) -> str:
    """The task's name, but for bytes that are no letters, which Arrow's strings do not hold."""
    return task.name.encode("utf-8", "backslashreplace").decode()


class Maker:
    """An actor: the tool with its nets, as `map_batches` has it make pictures."""

    def __init__(self, opening: Opening, prefix: str, folder: str, threads: int) -> None:
        """`folder` is where relative names begin, `threads` are those of the CPU that one process has."""
        os.chdir(folder)
        torch.set_num_threads(threads)
        self._args = opening.args
        self._args.quiet = True
        self._manifest = Manifest(self._args.output, f"{prefix}{time.time_ns()}-{os.getpid()}")
        self._tool: Tool | Exception
        try:
            self._tool = opening()
        except Exception as error:  # said of each picture: Ray would try the actor again and again
            self._tool = error

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        """Make the picture of `batch`, a row of `path` and `task`; `path` comes back, for the checkpoint."""
        task: Task = pickle.loads(batch["task"][0].as_py())
        if isinstance(self._tool, Exception):
            record = failed(task, self._args, error_line(self._tool, task, ""))
        else:
            record = attempt(self._tool, task, self._args)
        self._manifest.add(record)
        return batch.select(["path"])
