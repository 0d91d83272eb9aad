"""Documents, batches, rounds and the windows of chunks. Budget: 3 s."""

import numpy as np
import pytest

from core.config import AdaptConfig, EvalConfig
from core.scoring.adapt.documents import Documents, chunk_of, chunks_in, documents_of, rounds_of, width_of
from core.scoring.evaluation import Evaluation
from shared_tests.support.known_scores import BOS, make_dataset

LENGTHS = [7, 1, 30, 12, 9, 2, 17]


def settings(**changes: object) -> EvalConfig:
    adapt = {name[6:]: changes.pop(name) for name in list(changes) if name.startswith("adapt_")}
    chosen = {"windows": "documents", "seq": 12, **changes}
    return EvalConfig(adapt=AdaptConfig(**{"kind": "lora", "chunk": 5, "documents": 3, **adapt}), **chosen)  # type: ignore


@pytest.mark.parametrize("order", ["text", "length"])
@pytest.mark.parametrize("windows", ["documents", "stateful"])
def test_every_target_is_in_one_chunk(windows: str, order: str) -> None:
    dataset, config = make_dataset(LENGTHS), settings(windows=windows, adapt_order=order)
    tokens = dataset.val.tokens
    documents = documents_of(Evaluation(dataset.val, config))
    seen = []
    for batch in (batch for batches in rounds_of(documents, 3, 2) for batch in batches):
        for number in range(int(chunks_in(batch.targets, 5).max())):
            chunk = chunk_of(dataset.val, batch, 3, number, config)
            inputs, positions, kept, _ = (*chunk.view[:3], None)
            seen.append(positions[kept])
            assert (tokens[positions[kept]] == chunk.targets[kept]).all()
            assert (tokens[positions[kept] - 1] == inputs[kept]).all()
            for row, (begin, count) in enumerate(zip(batch.begin, batch.targets, strict=True)):
                used, end = int(chunk.used[row]), min(5 * (number + 1), int(count))
                if not used:
                    assert not kept[row].any() and chunk.last[row]
                    continue
                start = 5 * number if windows == "stateful" else max(0, end - 12)
                assert inputs[row, :used].tolist() == tokens[begin + start : begin + end].tolist()
                assert kept[row].sum() == end - 5 * number and kept[row, used - 1] and not inputs[row, used:].any()
                assert (BOS in inputs[row, 1:used].tolist()) is False, "no window reads two documents"
                assert chunk.last[row] == (end == count)
    assert sorted(np.concatenate(seen).tolist()) == list(range(1, len(tokens)))


def test_order_of_documents() -> None:
    dataset = make_dataset(LENGTHS)
    ends = np.append(np.cumsum(LENGTHS)[:-1], sum(LENGTHS) - 1)
    text = documents_of(Evaluation(dataset.val, settings()))
    assert text.begin.tolist() == np.cumsum([0, *LENGTHS[:-1]]).tolist()
    assert text.targets.tolist() == (ends - text.begin).tolist(), "the next document's BOS is the last target"
    longest = documents_of(Evaluation(dataset.val, settings(adapt_order="length")))
    assert longest.targets.tolist() == sorted(text.targets.tolist(), reverse=True)
    drawn = documents_of(Evaluation(dataset.val, settings(), documents=4))
    assert set(drawn.begin.tolist()) <= set(text.begin.tolist()) and len(drawn.begin) == 4
    assert drawn.number.tolist() == [0, 1, 2, 3] and (np.diff(drawn.begin) > 0).all()


def test_tokens_before_the_first_bos_are_a_document() -> None:
    dataset = make_dataset([5, 6])
    dataset.val.tokens = dataset.val.tokens[2:]
    dataset.val.document_starts = dataset.val.document_starts[1:] - 2
    documents = documents_of(Evaluation(dataset.val, settings()))
    assert documents.begin.tolist() == [0, 3] and documents.targets.tolist() == [3, 5]


def test_rounds_do_not_hang_on_ranks() -> None:
    documents = Documents(np.arange(50), np.full(50, 9), np.arange(50))
    rounds = rounds_of(documents, 4, 3)
    assert [len(batches) for batches in rounds] == [3, 3, 3, 3, 1]
    assert [int(batch.number[0]) for batches in rounds for batch in batches] == list(range(0, 50, 4))


@pytest.mark.parametrize("chunk, seq", [(48, 2048), (64, 512), (5, 12), (7, 7), (1, 64), (30, 32)])
def test_widths_are_few_and_wide_enough(chunk: int, seq: int) -> None:
    widths = [width_of(number, chunk, seq) for number in range(3 * seq // chunk + 2)]
    wanted = [min((number + 1) * chunk, seq) for number in range(len(widths))]
    assert all(seq >= width >= least for width, least in zip(widths, wanted, strict=True)) and widths[-1] == seq
    assert all(width <= 1.5 * least for width, least in zip(widths, wanted, strict=True))
    assert len(set(widths)) <= 2 * np.log2(seq / chunk + 1) + 3
