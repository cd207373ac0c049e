"""A run's page: one HTML file that needs nothing else, made again at any time from what the run wrote."""

from llavar_peft.page.write import has_run_page, write_run_page

__all__ = ["has_run_page", "write_run_page"]
