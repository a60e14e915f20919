"""The pages: links and anchors resolve, paths and flags exist, the README is short,
nothing in docs/ is an orphan.
"""

import argparse
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from weights.registry import MODELS, needed_files

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "weights/mini/README.md",
]
# History: what a dated entry says of a file or a flag was true on that day.
HISTORY = {"CHANGELOG.md", "docs/log.md"}
UNWRAPPED = {"docs/parity.md"}  # written by `make parity-table`
README_BYTES = 8500
WIDTH = 110  # columns of prose; tables and code excepted
# Flags of programs that are not ours, where a page names one alone.
FOREIGN = {"--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--shutdown-timeout"}  # torchrun's

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
OURS = re.compile(r"python -m tools\.(\w+)(.*)")
PATH = re.compile(r"(?:nets|samplers|weights|msbd|tools|tests|docs|examples)/[\w./-]*")


def name_of(path: Path) -> str:
    """The path below the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule: lower case, no punctuation, hyphens for spaces,
    -1 for a second.
    """
    found: dict[str, int] = {}
    slugs = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = LINK.sub(r"\1", heading).replace("`", "").replace("*", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        slugs.add(f"{slug}-{count}" if count else slug)
    return slugs


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of every relative link and picture;
    one into the page itself has the page as its file.
    """
    targets = [target for _, target in LINK.findall(SPAN.sub("", prose(page)))]
    # A picture inside a link's text, [![...](picture)](target), is a link of its own.
    targets += [target for text, _ in LINK.findall(prose(page)) for _, target in LINK.findall(text)]
    split = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in split]


def commands(page: Path) -> list[tuple[str, str]]:
    """Tool and arguments of every `python -m tools...` in a page's code blocks and code spans."""
    text = page.read_text(encoding="utf-8")
    blocks = [re.sub(r"\\\n\s*", " ", block) for block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()] + SPAN.findall(prose(page))
    found = [
        OURS.search(re.sub(r"(torchrun|python) [^#]*?-m tools", "python -m tools", line)) for line in lines
    ]
    return [(match[1], match[2].partition(" #")[0]) for match in found if match]


@cache
def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser of `python -m tools.TOOL`, a module or a folder with a __main__.py; nothing is run."""
    folder = (ROOT / "tools" / tool).is_dir()
    return importlib.import_module(f"tools.{tool}.__main__" if folder else f"tools.{tool}").build_parser()


def jobs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-commands of a parser, by name; none for most."""
    return {
        name: job
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, job in action.choices.items()
    }


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag that a parser and its sub-commands know."""
    own = set(parser._option_string_actions)
    return own.union(*(flags(job) for job in jobs(parser).values()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{name_of(page)} links to {file}, which is not there"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {name_of(file)} has no heading for #{anchor}"


def test_a_missing_file_and_a_missing_anchor_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` (c), d\n## Twice\n## Twice\n```\n# no heading\n```\n[x](#twice-1) ![y](gone.jpg) `[z](code)`\n"
    )
    assert anchors(page) == {"a-b-c-d", "twice", "twice-1"}
    assert links(page) == [(page, "twice-1"), ((tmp_path / "gone.jpg").resolve(), "")]


def test_the_readme_is_short() -> None:
    size = (ROOT / "README.md").stat().st_size
    assert size <= README_BYTES, (
        f"README.md has {size} bytes; at most {README_BYTES}: move something to docs/"
    )


def test_the_readme_s_figures_are_those_of_the_pages_behind_them() -> None:
    rows = re.findall(
        r"^\| \[.+?\]\((docs/\w+\.md)[^)]*\).*?\| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 4
    for page, figures in rows:
        text = (ROOT / page).read_text()
        for figure in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?(?: %)?", figures.replace("float32", "")):
            assert figure in text, f"README.md says {figure}, which {page} does not"


def test_every_file_of_docs_is_linked() -> None:
    linked = {file for page in PAGES for file, _ in links(page) if file != page}
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    # docs/bench/ is where `make gpu` writes, for each machine anew.
    orphans = {name_of(path) for path in files if path not in linked and path.parent.name != "bench"}
    assert not orphans, f"no page links to {sorted(orphans)}"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_paths_in_pages_exist(page: Path) -> None:
    """Paths from the root, in code spans: `msbd/edit/`, `tests/test_docs.py`;
    folders end in a slash or have no suffix.
    """
    spans = [span for span in SPAN.findall(prose(page)) if PATH.fullmatch(span)]
    missing = [span for span in spans if not (ROOT / span).exists() and span != "docs/bench/"]
    assert not missing, f"{name_of(page)} names {missing}, which are not there"


def test_what_a_copied_file_gives_is_in_it() -> None:
    rows = re.findall(
        r"^\| `(\w+/\w+\.py)` \|.*\| ([^|]+) \|$", (ROOT / "docs/copying.md").read_text(), re.MULTILINE
    )
    for file, gives in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`\.?(\w+)", gives):
            assert re.search(rf"\b(?:def|class) {name}\b", text), f"docs/copying.md: {file} has no {name}"


@pytest.mark.parametrize("folder", ["msbd", "nets", "samplers", "tools", "tests", "weights"])
def test_pages_that_code_points_to_exist(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in re.findall(r"\bdocs/[\w-]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{name_of(path)} points to {name}, which is not there"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_commands_in_pages_parse(page: Path) -> None:
    """The job and every flag are the parser's; a command without an ellipsis is parsed as a whole."""
    for tool, arguments in commands(page):
        parser, where = parser_of(tool), f"{name_of(page)}: python -m tools.{tool}{arguments}"
        words = shlex.split(arguments)
        unknown = {word for word in words if word.startswith("-")} - flags(parser)
        assert not unknown, f"{where}: no flag {sorted(unknown)}"
        if not words or any("..." in word for word in words):
            continue
        known = jobs(parser)
        assert not known or words[0] in known or words[0].startswith("-"), f"{where}: no job {words[0]!r}"
        if any(word.startswith("-") for word in words):
            try:
                parser.parse_args(words)
            except SystemExit as refused:
                assert refused.code == 0, f"{where}: is refused"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_flags_named_in_pages_exist(page: Path) -> None:
    """A flag named alone in a code span, `--fidelity 0.75`, is one of some command's."""
    tools = [path for path in (ROOT / "tools").iterdir() if (path / "__main__.py").is_file()]
    known = flags(parser_of("edit")).union(*(flags(parser_of(path.name)) for path in tools)) | FOREIGN
    named = {
        flag
        for span in SPAN.findall(prose(page))
        for flag in re.findall(r"(?<!\S)--[\w-]+", span)
        if span[0] == "-"
    }
    assert not named - known, f"{name_of(page)} names {sorted(named - known)}, which no command has"


def test_the_readme_says_what_fetching_pasd_brings() -> None:
    """PASD has a U-Net of its own, and Stable Diffusion is not there afterwards."""
    needed = {(file.part, file.repo) for file in needed_files(MODELS["pasd"])}
    assert not {part for part, repo in needed if part in ("unet", "all") and repo != "yangtao9009/PASD"}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "`fetch pasd` does not bring Stable Diffusion itself" in readme


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in UNWRAPPED], ids=name_of)
def test_prose_is_wrapped(page: Path) -> None:
    long = [line for line in prose(page).splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert not long, f"{name_of(page)}: more than {WIDTH} columns: {long[0]}"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_make_targets_in_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    code = SPAN.findall(prose(page)) + [line for block in FENCE.findall(text) for line in block.splitlines()]
    named = {found[1] for line in code if (found := re.match(r"make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", line))}
    assert not named - targets, f"{name_of(page)} names {sorted(named - targets)}, which the Makefile has not"
