"""The ``zarr.json`` of what tierstore writes as Zarr v3: groups, and uncompressed uint8 arrays of a single chunk.

See https://zarr-specs.readthedocs.io/en/latest/v3/core/. Made here and not by zarr-python, which would keep its threads
in the process; tests compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping


def group_document(mine: Mapping[str, object]) -> str:
    """Of a group with ``mine`` as its attribute ``tierstore``."""
    return json.dumps({"attributes": {"tierstore": mine}, "zarr_format": 3, "node_type": "group"})


def array_document(nbytes: int, mine: Mapping[str, object]) -> str:
    """Of an array of ``nbytes``, whose chunk ``c/0`` is its raw bytes, with ``mine`` as its attribute ``tierstore``."""
    return json.dumps(
        {
            "shape": [nbytes],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(nbytes, 1)]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}],
            "attributes": {"tierstore": mine},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
    )
