"""MkDocs hooks: insert the reference of recipe fields, which is generated from the schema."""

from typing import Any

from llavar_peft.recipe.field_reference import describe_fields

MARKER = "<!-- recipe fields -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker on a page with the generated tables."""
    return markdown.replace(MARKER, describe_fields()) if MARKER in markdown else markdown
