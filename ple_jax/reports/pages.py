"""Renders pages from the templates in templates/, with every value escaped. A page needs no network and no script."""

from typing import Any

from ple_jax.reports import formats


def render(template: str, **values: Any) -> str:
    """Renders a page and returns its text.

    Args:
        template: a file of templates/; style.css and the macros of kit.html are in all of them.
        values: what the page shows.
    """
    import jinja2  # here: a run that ends without a page does without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ple_jax.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": formats.number,
        "share": formats.share,
        "duration": formats.duration,
        "bytes": formats.readable_bytes,
    }
    return environment.get_template(template).render(values)
