"""Hooks of MkDocs for `make docs`: pages from the repository's other texts, links to its files, and what must hold.

Links in the texts are those that work in the repository. In the site, one to a text leads to its page, and one to any
other file to a copy of it. A public name without a docstring or without a place in docs/api.md is a warning, and so an
error of a strict build, as is anything that a page would load from another host.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from markdown.extensions.toc import slugify
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = "docs"
PACKAGES = ("adamss_kernels", "adamss_kernels.adapters")
"""Whose `__all__` is public."""
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "bench/NOTES.md": "gpu-notes.md",
}
"""Texts outside of docs/ and the pages that are made of them."""
SPEED_PAGE = "speed.md"
"""Where those sections of the README go whose title begins so: they are long."""
_SPEED = "Speed"

logger = logging.getLogger("mkdocs.hooks.docs_site")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?:\[([\w./-]+)\])?(?<=\])\(([^)\s]+)\)")
LOADED = re.compile(r"<(?:script|img|iframe|link(?=[^>]*stylesheet))\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def on_pre_build(config: Any) -> None:
    """Warn of public names that are not documented."""
    api = (Path(config.docs_dir) / "api.md").read_text()
    for message in undocumented(ROOT, api):
        logger.warning(message)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other texts, and copies of the files that any text links to."""
    texts = {file.src_uri: f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()}
    contents = {page: (ROOT / source).read_text() for page, source in texts.items()}
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source == "README.md":
            text, contents[SPEED_PAGE] = split_readme(text)
            texts[SPEED_PAGE] = source
        contents[page], texts[page] = text, source
    for page, text in contents.items():
        linked, copied = relink(text, texts[page], page)
        existing = files.get_file_from_path(page)
        if existing is not None:
            existing.content_string = linked
        else:
            files.append(File.generated(config, page, content=linked))
        for path in copied:
            if files.get_file_from_path(path) is None:
                files.append(File(path, str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_post_build(config: Any) -> None:
    """Warn of what a page would load from another host."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        for tag in LOADED.findall(page.read_text()):
            logger.warning(f"{page.name} loads something from another host: {tag}")


def undocumented(root: Path, api: str) -> list[str]:
    """Return a message for each public name of the package under `root` that lacks a docstring or a place in `api`.

    Args:
        root: Where the package lies; it is read, not imported.
        api: Text of the page that says `::: name` for each name that it documents.
    """
    messages = []
    shown = set(re.findall(r"^::: (\S+)$", api, flags=re.MULTILINE))
    package = griffe.load(PACKAGES[0], search_paths=[str(root)], try_relative_path=False)
    known: set[str] = set()
    for name in PACKAGES:
        module = package if name == PACKAGES[0] else package[name.removeprefix(PACKAGES[0] + ".")]
        for export in module.exports or ():
            public = module[str(export)]
            target = public.final_target if public.is_alias else public
            known.add(target.canonical_path)
            if shown.isdisjoint((f"{name}.{export}", target.canonical_path)):
                messages.append(f"docs/api.md: {name}.{export} is public, but has no line `::: {name}.{export}`")
            members = target.members.values() if target.is_class else ()
            methods = [m for m in members if not m.is_alias and m.is_function and not m.name.startswith("_")]
            for thing in (target, *methods):
                if not thing.has_docstring:
                    messages.append(f"{thing.canonical_path} is public, but has no docstring")
    return messages


def split_readme(text: str) -> tuple[str, str]:
    """Return the README without its sections on speed, and those as a text of their own."""
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    speed = [section for section in sections if section.startswith(f"## {_SPEED}")]
    rest = [section for section in sections if section not in speed]
    return head + "".join(rest), f"# {_SPEED}\n\n" + "".join(speed)


def relink(text: str, source: str, page: str) -> tuple[str, list[str]]:
    """Return `text` with the links of the file `source` turned into those of `page`, and the files to be copied.

    Args:
        text: Markdown.
        source: Its path in the repository, from which its links start.
        page: Its path in the site's sources.
    """
    copied: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        label, link = match.groups()
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
        if target == "README.md" and anchor in _speed_anchors():
            goal = SPEED_PAGE
        elif target in PAGES:
            goal = PAGES[target] if path or source != "README.md" or page == PAGES[source] else PAGES["README.md"]
        elif target.startswith(f"{DOCS}/"):
            goal = target.removeprefix(f"{DOCS}/")
        elif (ROOT / target).is_file():
            goal = target
            copied.append(target)
        else:
            return match[0]  # MkDocs will complain
        if label == target and goal != target:  # a path says little in the site
            label = _title(target) or label
        prefix = f"[{label}]" if label else ""
        if goal == page and anchor:
            return f"{prefix}(#{anchor})"
        goal = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{prefix}({goal}#{anchor})" if anchor else f"{prefix}({goal})"

    parts = _CODE.split(text)
    parts[::2] = [_LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts), copied


def _title(path: str) -> str | None:
    """Return the title of the text `path`, if it has one."""
    match = re.search(r"^# (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE) if path.endswith(".md") else None
    return match[1] if match else None


def _speed_anchors() -> set[str]:
    speed = split_readme((ROOT / "README.md").read_text())[1]
    return {slugify(title, "-") for title in re.findall(r"^#+ (.*)$", speed, flags=re.MULTILINE)}
