"""The documents say what the code does: commands parse, links lead somewhere, every public thing is on its page."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from millpond.cli.main import build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def _write_reference():
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts/write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shell_lines(page):
    """Yield the commands in a page's sh blocks, with continued lines joined and comments cut off."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield [word for word in words if word != "&"]


def _inline_commands(page):
    """Yield the words of `millpond …` and `make …` in running text."""
    for code in re.findall(r"`((?:millpond|make) [^`]+)`", page.read_text()):
        words = shlex.split(code)
        several = next((word for word in words if "|" in word), "")  # `millpond registry list|show`: each of them
        for choice in several.split("|"):
            yield [choice if word == several else word for word in words]


# --- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_in_a_page_exists(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in [*_shell_lines(page), *_inline_commands(page)]:
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables before a command
            words = words[1:]
        if words[:1] == ["make"]:
            named = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
            assert set(named) <= targets, f"{shlex.join(words)}: no such target"
        elif words[:1] == ["millpond"]:
            _check_millpond(words)


def _check_millpond(words):
    command = get_command(build([], whole=True))
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if rest and getattr(command, "commands", {}) and not rest[0].startswith(("-", "<", "…")):
        pytest.fail(f"{shlex.join(words)}: there is no command {rest[0]!r}")
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]} | {"--help"}
    options = rest[: rest.index("--")] if "--" in rest else rest
    for option in options:
        if option.startswith("-"):
            assert option.split("=")[0] in known, f"{shlex.join(words)}: there is no option {option}"


def test_readme_has_the_two_commands_in_blocks_of_their_own():
    lines = list(_shell_lines(ROOT / "README.md"))
    assert ["make", "demo"] in lines
    assert ["make", "test"] in lines


def test_tree_in_the_readme_is_the_tree():
    tree = re.search(r"^```\n(src/millpond/.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    top = ""
    listed = set()
    for line in tree.splitlines():
        name = line.split()[0]
        top = "" if not line.startswith(" ") else top
        path = ROOT / top / name
        assert path.exists(), f"{path} is in the README's tree only"
        listed.add(path)
        top = name if not line.startswith(" ") else top
    parts = {path for path in (ROOT / "src/millpond").iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert parts <= listed, f"not in the README's tree: {sorted(str(path) for path in parts - listed)}"


# --- links and completeness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s:]+\.md)(?:#[^)]*)?\)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links]
    lost = set(DOCS.rglob("*.md")) - reached
    assert not lost, f"no link leads to {sorted(str(page.relative_to(ROOT)) for page in lost)}"


@pytest.mark.parametrize("name", ["settings.md", "cli.md"])
def test_generated_reference_is_up_to_date(name):
    written = (DOCS / "reference" / name).read_text()
    assert written == _write_reference().PAGES[name](), "run: make fix"


def test_every_field_of_a_model_is_on_the_artifact_page():
    from millpond.registry import DataSource, Lineage, ModelConfig
    from millpond.registry.manifest import ARTIFACT_TYPE, CONFIG_TYPE, FILES, LAYER_TYPES, MANIFEST_TYPE

    page = (DOCS / "reference/artifact.md").read_text()
    fields = [field for struct in (ModelConfig, DataSource, Lineage) for field in struct.__struct_fields__]
    types = [*LAYER_TYPES.values(), ARTIFACT_TYPE, CONFIG_TYPE, MANIFEST_TYPE]
    missing = [name for name in [*fields, *FILES, *types] if f"`{name}`" not in page]
    assert not missing


def test_glossary_is_in_order_and_names_what_the_style_asks_for():
    terms = re.findall(r"^\*\*([^*]+)\*\*:", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert terms == sorted(terms)
    wanted = {"lease", "worker", "broker", "session", "epoch", "logits", "artifact", "digest", "outbox", "correction"}
    assert wanted | {"champion", "candidate"} <= set(terms)


def test_changelog_has_a_place_for_what_is_new():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
