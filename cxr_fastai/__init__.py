"""From folders of chest radiographs to a classifier that can be trusted, explained and handed over."""

__version__ = "0.1.0"
