"""Write the reference of the package as one page in HTML, from its docstrings.

    python benchmarks/api_page.py --output runs/api.html

Every public name of every module with signature and docstring, the public names of the package
first. Names in backticks become links where the page has them.
"""

from __future__ import annotations

import argparse
import html
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cliptteacher
from cliptteacher.files import write_text
from cliptteacher.pages import page, text

CODE = re.compile(r"`{1,2}([\w.]+)(\([^`]*\))?`{1,2}")
STYLE = """<style>h2 code { font-size: 17px; } h3 { font-size: 15px; margin: 22px 0 2px; }
pre { margin: 2px 0 8px; } .inside { margin-left: 24px; } a { color: #1f5fa8;
text-decoration: none; } h3 code { overflow-wrap: anywhere; }</style>"""
Found = tuple[str, str, Any]  # module, name within it, object


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    args = parser.parse_args(argv)
    write_text(build(), args.output)
    print(f"{args.output}, {args.output.stat().st_size / 1024:.0f} KiB")


def build() -> str:
    """Return the page."""
    modules = dict(find_modules())
    found = [each for module in modules.values() for each in public_names(module)]
    anchors = make_anchors(modules, found)
    short = [f"{cliptteacher.__name__}.{name}" for name in sorted(cliptteacher._HOME)]
    parts = [STYLE, "<h2>By name</h2>", "<p>" + ", ".join(link(name, anchors) for name in short)]
    parts += ["</p><h2>Modules</h2>", "<p>" + ", ".join(link(name, anchors) for name in modules)]
    parts.append("</p>")
    for name, module in modules.items():
        parts.append(f'<h2 id="{name}"><code>{name}</code></h2>{documented(module, anchors)}')
        parts += [entry(each, anchors) for each in found if each[0] == name]
    return page(f"cliptteacher {cliptteacher.__version__}", "\n".join(parts))


def find_modules() -> Iterator[tuple[str, ModuleType]]:
    """Import every module of the package but the one that runs."""
    yield "cliptteacher", cliptteacher
    for info in pkgutil.walk_packages(cliptteacher.__path__, "cliptteacher."):
        if not info.name.endswith("__main__"):
            yield info.name, importlib.import_module(info.name)


def public_names(module: ModuleType) -> Iterator[Found]:
    """Functions and classes that a module defines, and the methods of the classes."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not own or not (inspect.isfunction(value) or inspect.isclass(value)):  # noqa: E501  # fmt: skip
            continue
        yield module.__name__, name, value
        for inner, method in vars(value).items() if inspect.isclass(value) else ():
            function = method.fget if isinstance(method, property) else method
            function = getattr(function, "__func__", function)
            if not inner.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield module.__name__, f"{name}.{inner}", function


def make_anchors(modules: dict[str, ModuleType], found: list[Found]) -> dict[str, str]:
    """Map every way to write a name to its place; a name that two places have leads nowhere."""
    anchors = {name: name for name in modules}
    for name, home in cliptteacher._HOME.items():
        value = getattr(importlib.import_module(f"cliptteacher.{home}"), name)
        anchors[f"cliptteacher.{name}"] = f"{value.__module__}.{name}"
    ways: dict[str, set[str]] = {}
    for module, name, _ in found:
        whole = f"{module}.{name}"
        pieces = whole.split(".")
        for start in range(len(pieces)):
            ways.setdefault(".".join(pieces[start:]), set()).add(whole)
    return {**{way: min(places) for way, places in ways.items() if len(places) == 1}, **anchors}


def link(name: str, anchors: dict[str, str]) -> str:
    return f'<a href="#{anchors[name]}"><code>{name.removeprefix("cliptteacher.")}</code></a>'


def entry(found: Found, anchors: dict[str, str]) -> str:
    """One function, class or method."""
    module, name, value = found
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        signature = ""
    kind = "class " if inspect.isclass(value) else ""
    head = f"{kind}<b>{text(name)}</b>{text(signature)}"
    inside = ' class="inside"' if "." in name else ""
    return (
        f'<div{inside}><h3 id="{module}.{name}"><code>{head}</code></h3>'
        f"{documented(value, anchors)}</div>"
    )


def documented(value: Any, anchors: dict[str, str]) -> str:
    """The docstring, with links; none where a class only repeats its signature."""
    words = inspect.getdoc(value) or ""
    if not words or words.startswith(f"{getattr(value, '__name__', '')}("):
        return ""

    def linked(match: re.Match[str]) -> str:
        name, call = match.group(1), match.group(2) or ""
        place = anchors.get(name)
        return f'<a href="#{place}">{name}{call}</a>' if place else f"<b>{name}{call}</b>"

    return f"<pre>{CODE.sub(linked, html.escape(words, quote=False))}</pre>"


if __name__ == "__main__":
    main()
