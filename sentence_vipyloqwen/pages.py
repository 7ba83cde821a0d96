"""How pages are rendered: strict about what a template names, and HTML escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def load_template(package: str, name: str) -> Template:
    """Load a template of HTML from the ``templates`` folder of a package.

    Args:
        package: Dotted name of the package.
        name: File name of the template.

    Raises:
        jinja2.TemplateNotFound: If there is none of that name.
    """
    return _load(package, name, escape=True)


def load_markdown(package: str, name: str) -> Template:
    """Load a template of Markdown, as :func:`load_template` does; what it is given stands there as it is."""
    return _load(package, name, escape=False)


def _load(package: str, name: str, escape: bool) -> Template:
    loader = PackageLoader(package)
    environment = Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
