"""A browser for the tests of pages."""

from tests.helpers.browser import chromium

__all__ = ["chromium"]
