"""How results show themselves in notebooks: tables in HTML, figures, data frames, a page."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Shown:
    """A result that has `to_dict`, and through it everything that `eckart report` shows."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        raise NotImplementedError

    def document(self) -> Mapping[str, Any]:
        """Return what a page is made of: `to_dict`, and what is too large for that."""
        return self.to_dict()

    def _repr_html_(self) -> str:
        """Return its tables as HTML, names in it escaped."""
        from . import documents, page

        return page.fragment(documents.sections(plain(self.to_dict()), type(self).__name__)[:1])

    def plot(self) -> "Figure":
        """Return its figures as one of matplotlib, which notebooks show and `savefig` writes.

        Raises:
            ConfigError: matplotlib is not installed, or it has no figures.
        """
        from . import documents, pictures

        found = documents.sections(plain(self.document()), type(self).__name__)
        return pictures.figure(documents.drawn(found))

    def to_frame(self) -> "DataFrame":
        """Return its main table as a data frame: a row for each matrix, step or setting.

        Raises:
            ConfigError: pandas is not installed.
        """
        from ..errors import ConfigError
        from . import documents

        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ConfigError("data frames need pandas: pip install 'eckart[report]'") from error
        return DataFrame.from_records(documents.records(plain(self.to_dict()), type(self).__name__))

    def to_html(self) -> str:
        """Return the whole page that `eckart report` writes, which needs no network."""
        from .. import environment
        from . import page

        values = {"environment": environment.describe(), **plain(self.document())}
        return page.page([(type(self).__name__, values)])


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as they are after a way through JSON."""
    import json

    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found
