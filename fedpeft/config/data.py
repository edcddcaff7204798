"""Where rows come from, how they are split, and how a simulation deals them out to sites."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.config.fields import Choice, Table, choice, require, require_range


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns, by role; a task reads those of the roles that it asks for.

    An empty `group` means that rows have no natural group.
    """

    text: str = "text"
    label: str = "label"
    group: str = ""
    answer: str = "answer"
    target: str = "target"
    chosen: str = "chosen"
    rejected: str = "rejected"
    words: str = "words"
    tags: str = "tags"
    messages: str = "messages"
    image: str = "image"


@dataclass(frozen=True)
class Bundled:
    """A data set that `fedpeft assets fetch` has put into the cache, by name."""

    name: str = "sentiment"


@dataclass(frozen=True)
class FileSource:
    """One file, or a folder or glob of files of the same kind, on this machine."""

    path: str = ""
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class JsonLines(FileSource):
    """One JSON object a line."""


@dataclass(frozen=True)
class Csv(FileSource):
    """Comma-separated values with a header line; `delimiter` may be another character."""

    delimiter: str = ","

    def __post_init__(self) -> None:
        require(len(self.delimiter) == 1, "delimiter", expected="one character", found=self.delimiter)


@dataclass(frozen=True)
class Parquet(FileSource):
    """Parquet files (needs the `data` extra)."""


@dataclass(frozen=True)
class Hub:
    """A data set by its Hugging Face Hub name, or a local folder in that layout (needs the `data` extra)."""

    name: str = ""
    config: str = ""
    split: str = "train"
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class Images:
    """A folder of images, one sub-folder for each label; with `groups`, a folder of such folders, one a group.

    Reading images needs the `vision` extra.
    """

    path: str = ""
    groups: bool = False


SOURCES = Table(
    "source",
    {"bundled": Bundled, "jsonl": JsonLines, "csv": Csv, "parquet": Parquet, "hub": Hub, "images": Images},
)


@dataclass(frozen=True)
class Iid:
    """Rows are shuffled and dealt out evenly."""


@dataclass(frozen=True)
class Dirichlet:
    """Each label's rows are shared among the sites in proportions drawn from Dirichlet(alpha)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha", expected="a number above 0", found=self.alpha)


@dataclass(frozen=True)
class ByLabel:
    """Each site holds rows of only so many labels."""

    labels_per_site: int = 2

    def __post_init__(self) -> None:
        require_range(self, "labels_per_site", 1)


@dataclass(frozen=True)
class ByGroup:
    """Each value of the group column is split evenly over its own sites; sites never mix groups.

    With fewer sites than groups, each site holds whole groups.
    """


@dataclass(frozen=True)
class BySize:
    """Rows are dealt out at random in sizes that fall as rank^(-exponent); 0 is even."""

    exponent: float = 1.0

    def __post_init__(self) -> None:
        require_range(self, "exponent", 0.0)


PARTITIONS = Table("rule", {"iid": Iid, "dirichlet": Dirichlet, "label": ByLabel, "group": ByGroup, "size": BySize})


@dataclass(frozen=True)
class PartitionConfig:
    """How training rows are dealt out to the sites of a simulation."""

    by: Choice = choice(PARTITIONS, "iid")
    least_rows: int = 2
    most_rows: int = 0

    def __post_init__(self) -> None:
        require_range(self, "least_rows", 1)
        require_range(self, "most_rows", 0)


@dataclass(frozen=True)
class DataConfig:
    """One source of rows, split once into training and held-out rows.

    `test_fraction` of each group is held out, at most `most_test_rows` of a group (0: no bound). `server_rows` of the
    others stay with the server, which chooses by them what some adapter families train; no site has them.
    """

    origin: Choice = choice(SOURCES, "bundled")
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    test_fraction: float = 0.1
    most_test_rows: int = 0
    server_rows: int = 0

    def __post_init__(self) -> None:
        require_range(self, "server_rows", 0)
        require(0 < self.test_fraction < 1, "test_fraction", expected="between 0 and 1", found=self.test_fraction)
        require_range(self, "most_test_rows", 0)
