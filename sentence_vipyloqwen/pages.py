"""How every page of HTML is rendered: escaped, and strict about what a template names."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def load_template(package: str, name: str) -> Template:
    """Load a template from the ``templates`` folder of a package.

    Args:
        package: Dotted name of the package.
        name: File name of the template.

    Raises:
        jinja2.TemplateNotFound: If there is none of that name.
    """
    environment = Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
