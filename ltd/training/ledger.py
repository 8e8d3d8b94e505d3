"""The loss ledger: losses of samples by source, size, time and caption, added up where they are made.

A row of ``ledger.jsonl`` holds the sums of the steps since the row before, so the whole run is the sum of its rows, and
a run that goes on from a checkpoint, which always ends with a row, continues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltd.data import DataConfig, Loader, MicroBatch, PackedBatch
from ltd.parallel.layout import Layout
from ltd.tracking.journal import Journal
from ltd.tracking.ledger import LEDGER
from ltd.training.accounting import AccountingConfig
from ltd.training.work import Work

#: Source, size, part of the times and kind of caption.
Cell = tuple[str, str, int, str]
_CAPACITY = 1024
_COLUMNS = 4  # samples, sum, sum of squares, samples whose loss is not finite


class Ledger:
    """Add up the losses of this process's samples; all processes write together.

    Args:
        config: How finely.
        layout: Processes of the run.
        loader: Knows the source of a sample.
        data: The data section, for the names of the data sets.
        run_dir: Where the file is.
        start_step: First step that will be added.
    """

    def __init__(
        self,
        config: AccountingConfig,
        layout: Layout,
        loader: Loader,
        data: DataConfig,
        *,
        run_dir: str,
        start_step: int,
    ) -> None:
        self.config, self.layout = config, layout
        self._sources = Sources(loader, data, config.max_shards)
        self._slots: dict[Cell, int] = {}
        self._table = torch.zeros(_CAPACITY, _COLUMNS, dtype=torch.float64, device=layout.device)
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._first = start_step
        self._journal: Journal | None = None
        if layout.is_main:
            self._journal = Journal(Path(run_dir) / LEDGER, start_step=start_step)

    def note(self, batch: MicroBatch, work: Work, losses: Tensor) -> None:
        """Note the losses of a micro-batch for ``commit``; does not wait for them.

        Args:
            batch: This process's samples, on the CPU.
            work: Tells their times and which captions were dropped.
            losses: Loss of each sample ``(b,)``, on the device.
        """
        cells = self._cells(batch, work)
        slots = [self._slots.setdefault(cell, len(self._slots)) for cell in cells]
        counted = torch.tensor([float(weight > 0) for weight in batch.weight.tolist()], dtype=torch.float64)
        index, counted = (x.to(losses.device, non_blocking=True) for x in (torch.tensor(slots), counted))
        finite = torch.isfinite(losses).double() * counted
        values = torch.where(finite > 0, losses.double(), 0)
        self._noted.append((index, torch.stack((finite, values, values.square(), counted - finite), 1)))

    def commit(self) -> None:
        """Take in what was noted since the last time: the step was not one to stop at or to go back from."""
        self._grow()
        for index, rows in self._noted:
            self._table.index_add_(0, index, rows)
        self._noted.clear()

    def write(self, step: int) -> None:
        """Write the row of the steps since the last one; called by all processes, and waits for them.

        Args:
            step: Steps done.
        """
        if step < self._first:
            return
        self._grow()  # cells may be known from a step that was noted and not taken
        sums = self._table[: len(self._slots)].tolist()
        mine = {cell: sums[slot] for cell, slot in self._slots.items() if any(sums[slot])}
        gathered = self.layout.gather_objects(mine)
        self._table.zero_()
        if self._journal is not None:
            total: dict[Cell, np.ndarray] = {}
            for part in gathered:
                for cell, values in part.items():
                    total[cell] = total.get(cell, np.zeros(_COLUMNS)) + np.array(values)
            rows = [[*cell, int(n), first, second, int(bad)] for cell, (n, first, second, bad) in sorted(total.items())]
            self._journal.append(step, {"from": self._first, "cells": rows})
        self._first = step + 1

    def close(self) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.close()

    def _grow(self) -> None:
        while len(self._slots) > len(self._table):
            self._table = torch.cat((self._table, torch.zeros_like(self._table)))

    def _cells(self, batch: MicroBatch, work: Work) -> list[Cell]:
        groups = batch.groups if isinstance(batch, PackedBatch) else (batch,)
        sources = self._sources.names([entry for group in groups for entry in group.entries])
        sizes = [str(group.shape) for group in groups for _ in range(len(group))]
        captions = [
            _caption_kind(text, column)
            for group in groups
            for text, column in zip(group.captions, group.caption_columns or (0,) * len(group), strict=True)
        ]
        parts = self.config.time_quantiles
        times = [min(int(q * parts), parts - 1) for q in work.quantiles] or [0] * len(batch)
        dropped = work.dropped or (False,) * len(batch)
        kinds = ["dropped" if gone else kind for gone, kind in zip(dropped, captions, strict=True)]
        return list(zip(sources, sizes, times, kinds, strict=True))


class Sources:
    """Name the data set and shard of samples.

    Args:
        loader: Holds the index of all data sets.
        data: Names them.
        max_shards: A data set of more shards is one source.
    """

    def __init__(self, loader: Loader, data: DataConfig, max_shards: int) -> None:
        self._source = loader.source
        self._sets = [dataset.name or str(number) for number, dataset in enumerate(data.sets)]
        self._names: dict[tuple[int, int], str] = {}
        shards = self._source.entries.columns["shard"]
        ends = [*self._source.starts[1:], len(shards)]
        self._split = [
            self._source.random_cuts and len(np.unique(shards[begin:end])) <= max_shards
            for begin, end in zip(self._source.starts, ends, strict=True)
        ]

    def names(self, entries: Sequence[int]) -> list[str]:
        """Name the sources of samples by their places in the index: ``SET/SHARD``, or the data set alone."""
        numbers = (np.searchsorted(self._source.starts, entries, side="right") - 1).tolist()
        shards = self._source.entries.columns["shard"][np.asarray(entries, dtype=np.int64)].tolist()
        found = []
        for entry, number, shard in zip(entries, numbers, shards, strict=True):
            key = (number, shard if self._split[number] else -1)
            if key not in self._names:
                name = Path(self._source.shard_of(entry)).name
                self._names[key] = f"{self._sets[number]}/{name}" if self._split[number] else self._sets[number]
            found.append(self._names[key])
        return found


def _caption_kind(text: str, column: int) -> str:
    if not text:
        return "none"
    return "caption" if column == 0 else f"caption {column + 1}"
