"""Check the options of a join before its hub is asked, for the commands that join and that install a join as a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsoda_edge.cli.data_command import column_names
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.units import parse_bytes

if TYPE_CHECKING:
    from fedsoda_edge.data.local_data import LocalData
    from fedsoda_edge.edge import Edge


@dataclass(frozen=True, kw_only=True)
class JoinChoices:
    """The options of a join that decide what it does, as they were written."""

    url: str | None
    data: Path
    link_file: str | None
    token_file: str | None
    pin: str | None
    insecure_http: bool
    column: list[str] | None
    device: str
    max_disk: str | None
    cache: str
    cache_key: str
    threads: int
    max_ram: str | None
    max_vram: str | None
    pause_on: str | None

    def checked(self) -> tuple[Edge, LocalData]:
        """Return the edge and its data. Rows of a template that a person wrote are read once, to be refused early.

        Raises:
            UsageProblem: an option has a value that is not known.
            DataProblem: the data cannot be used.
        """
        from fedsoda_edge.data.local_data import LocalData
        from fedsoda_edge.device.pause_rules import parse_pause_rules
        from fedsoda_edge.edge import Edge

        # Wrong options are reported before data is read, which may take minutes; bad data before the hub is asked.
        parse_pause_rules(self.pause_on or "")
        if self.cache_key not in ("keep", "forget"):
            raise UsageProblem(f"--cache-key {self.cache_key!r} is not known; choose keep or forget")
        local = LocalData.from_jsonl(self.data, columns=column_names(self.column or []))
        edge = Edge(
            self.url,
            link_file=self.link_file,
            token_file=self.token_file,
            pin=self.pin,
            insecure_http=self.insecure_http,
            device=self.device,
            threads=self.threads,
            max_disk=None if self.max_disk is None else parse_bytes(self.max_disk, "--max-disk"),
            cache=self.cache,
            keep_cache_key=self.cache_key == "keep",
            max_ram=None if self.max_ram is None else parse_bytes(self.max_ram, "--max-ram"),
            max_vram=None if self.max_vram is None else parse_bytes(self.max_vram, "--max-vram"),
        )
        for _ in local.rows() if local.is_text else ():
            pass
        return edge, local
