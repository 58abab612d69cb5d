# SPDX-License-Identifier: Apache-2.0
"""The templates of pages and cards: what a template asks for and is not given is an error."""

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from quantkit.text import printable_lines


def template(name: str, *, escape: bool, **filters: Callable[[object], str]) -> Template:
    """A template of the package; what is put into it becomes printable.

    escape: everything put into it is escaped as HTML.
    """
    environment = Environment(
        loader=PackageLoader("quantkit.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        finalize=lambda value: printable_lines(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
