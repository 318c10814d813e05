"""Pages that are lost, of what the cache does not know the tokens of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hf.paged import decoder, generated, paged, prompt, smallest
from tests.hf.test_kv_cache import DamagedFile
from tierstore.errors import PageLostError
from tierstore.hf.kv import memory


def test_embeddings_cannot_be_computed_from_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PageFile", DamagedFile)
    llama = decoder("LlamaForCausalLM")
    embedded = llama.get_input_embeddings()(prompt(60)).detach()
    want, _ = generated(llama, inputs_embeds=embedded)

    def until_lost() -> None:
        for _ in range(9):
            found, _ = generated(llama, inputs_embeds=embedded)
            assert torch.equal(found, want)

    with paged(llama, tmp_path, kv_hbm=smallest(llama, kv_nvme=1 << 20), kv_nvme=1 << 20):
        for _ in range(3):  # so often is damaged
            with pytest.raises(PageLostError, match="something else than tokens entered"):
                until_lost()
        until_lost()
