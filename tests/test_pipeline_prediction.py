"""Predicted pipelines: schedules by the clock against hand and invariants, cuts against brute force, sizes by hand."""

import itertools
import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mhc_compile
from mhc_compile import MHCOptionError
from mhc_compile.__main__ import app
from mhc_compile.reports.pipeline_cuts import SLACK, propose_cuts
from mhc_compile.reports.pipeline_prediction import Pipeline
from mhc_compile.reports.prediction import Workload
from mhc_compile.reports.schedules import Action, Schedule, play, schedule_of

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def clock(name, ranks, microbatches, transfer):
    schedule = schedule_of(name, ranks, microbatches)
    return schedule, play(schedule, lambda kind, stage: SECONDS[kind], transfer)


def test_two_microbatches_by_hand():
    # Rank 0: F0 0-1, F1 1-2. Rank 1, sent to from 1 to 1.5: F0 to 2.5, B0 to 4.5. Then, as torch's 1F1B receives F1 and
    # sends the gradient of B0 at once and waits for both, F1 from 5 to 6, B1 to 8. On rank 0 B0 from 5 to 7, and B1,
    # sent to from 8 to 8.5, to 10.5. With sends that take no time it ends at 9.
    _, timeline = clock("1F1B", 2, 2, 0.5)
    spans = {(span.rank, span.action.kind, span.action.microbatch): (span.start, span.end) for span in timeline.spans}
    assert spans[1, "RECV_F", 0] == (1.0, 1.5)
    assert [spans[1, kind, 0] for kind in "FB"] == [(1.5, 2.5), (2.5, 4.5)]
    assert [spans[1, kind, 1] for kind in "FB"] == [(5.0, 6.0), (6.0, 8.0)]
    assert [spans[0, "B", number] for number in range(2)] == [(5.0, 7.0), (8.5, 10.5)]
    assert timeline.seconds == 10.5
    assert clock("1F1B", 2, 2, 0.0)[1].seconds == 9.0


def test_sends_on_one_way_wait_for_each_other_and_for_their_receives():
    sends = [Action(kind, 0, number) for number in range(2) for kind in ("F", "SEND_F")]
    early = [Action("RECV_F", 1, 0), Action("RECV_F", 1, 1), Action("F", 1, 0), Action("F", 1, 1)]
    late = [Action("RECV_F", 1, 0), Action("F", 1, 0), Action("RECV_F", 1, 1), Action("F", 1, 1)]
    # Both are sent by 2. The second waits for the first, or for its receive as well, which rank 1 posts at 5.
    for receives, second in ((early, (4.0, 7.0)), (late, (5.0, 8.0))):
        schedule = Schedule("by hand", 2, 2, (0, 1), (tuple(sends), tuple(receives)))
        timeline = play(schedule, lambda kind, stage: SECONDS[kind], 3.0)
        sent = {span.action.microbatch: (span.start, span.end) for span in timeline.spans if "RECV" in span.action.kind}
        assert sent == {0: (1.0, 4.0), 1: second}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_respects_what_it_depends_on(name):
    schedule, timeline = clock(name, 4, 8, 0.25)
    spans = {span.action: span for span in timeline.spans}
    assert len(spans) == len(timeline.spans)
    for rank in range(4):
        mine = [span for span in spans.values() if span.rank == rank and span.action.kind in SECONDS]
        computed = sorted((span.start, span.end) for span in mine)
        assert all(before <= after for (_, before), (after, _) in itertools.pairwise(computed))
    for stage, number in itertools.product(range(schedule.stages), range(8)):
        forward = spans[Action("F", stage, number)]
        backward = spans.get(Action("B", stage, number)) or spans[Action("I", stage, number)]
        assert backward.start >= forward.end
        if stage:
            _follows(spans, schedule, forward, "F", "RECV_F", stage - 1)
        if stage < schedule.stages - 1:
            _follows(spans, schedule, backward, "BI", "RECV_B", stage + 1)


def _follows(spans, schedule, span, kinds, received, stage):
    number = span.action.microbatch
    source = next(spans[action] for kind in kinds if (action := Action(kind, stage, number)) in spans)
    if schedule.rank_of[stage] == span.rank:
        assert span.start >= source.end
    else:
        assert span.start >= spans[Action(received, span.action.stage, number)].end >= source.end + 0.25


def test_what_1f1b_holds_and_sends_by_hand():
    schedule = schedule_of("1f1b", 4, 8)
    assert [schedule.most_alive(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [schedule.sends(rank) for rank in range(4)] == [8, 16, 16, 8]
    assert clock("1f1b", 4, 8, 0.0)[1].seconds == (8 + 3) * 3.0


def test_cuts_are_those_of_brute_force():
    draw = random.Random(0)
    for _ in range(30):
        time, memory = ([draw.randint(1, 9) for _ in range(7)] for _ in range(2))
        weight = [draw.randint(1, 3) for _ in range(3)]

        def seconds(start, end, time=time):
            return sum(time[start:end])

        def held(stage, start, end, memory=memory, weight=weight):
            return weight[stage] * sum(memory[start:end])

        every = [(*ends, 7) for ends in itertools.combinations(range(1, 7), 2)]
        slowest = {ends: max(itertools.starmap(seconds, itertools.pairwise((0, *ends)))) for ends in every}
        fullest = {ends: max(held(n, *span) for n, span in enumerate(itertools.pairwise((0, *ends)))) for ends in every}
        good = [ends for ends in every if slowest[ends] <= min(slowest.values()) * (1 + SLACK)]
        found = propose_cuts(7, 3, seconds, held)
        assert found in good
        assert fullest[found] == min(fullest[ends] for ends in good)


@pytest.fixture(scope="module")
def model():
    # A layer has (4 + 3 * 4) * 1024 squared parameters, and the head as many as two layers.
    config = LlamaConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8,
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def explained(model, ranks, schedule, **more):
    ids = torch.zeros(1, 32, dtype=torch.long, device="meta")
    workload = Workload(2048, "h100", Pipeline(ranks, schedule, **more))
    return mhc_compile.explain(model, input_ids=ids, predict_for=workload)


def test_a_small_model_is_cut_where_its_head_weighs(model):
    report = explained(model, 4, "1F1B", microbatches=8, network=1e9)
    found = report.pipeline
    # 9 + 2 layers in 4 stages: 3 in the slowest. The first holds an embedding and the most microbatches: it gets fewer.
    assert [stage.blocks for stage in found.stages] == [2, 3, 3, 1]
    assert [stage.first for stage in found.stages] == [f"model.layers.{number}" for number in (0, 2, 5, 8)]
    assert sum(stage.parameters for stage in found.stages) == report.parameters_before + report.parameters_added
    # Rank 1 sends a stream forward and its gradient back, 4 x 1024 features in bfloat16 for each of 2048 tokens.
    assert found.mhc.sent_bytes == 8 * 2 * 2048 * 4 * 1024 * 2
    assert found.plain.sent_bytes * 4 == found.mhc.sent_bytes
    assert found.mhc.transfer_seconds == 2048 * 4 * 1024 * 2 / 1e9
    assert found.divisible is None
    assert found.mhc.exposed_seconds > found.plain.exposed_seconds > 0
    forward = sum(stage.forward_seconds for stage in found.stages)
    products = report.prediction.plain_seconds / 3
    assert forward > products == pytest.approx(forward - 18 * per_site_forward(), rel=1e-9)


def per_site_forward():
    from mhc_compile.kernels.costs import traffic
    from mhc_compile.kernels.costs.fusion_choice import choose_on
    from mhc_compile.kernels.costs.gpus import GPUS

    sizes = {"tokens": 2048, "width": 1024, "n_streams": 4, "element_size": 2}
    assert choose_on(GPUS["h100"], 2048, 1024, 4, torch.bfloat16).fusion == "boundary"
    # Each block's norms are within the operators.
    moved, norm, plain = (
        traffic.evaluate(one.forward.ours.bytes, **sizes)
        for one in (traffic.OPERATORS["post_pre_norm"], traffic.NORM, traffic.PLAIN)
    )
    return (moved - norm - plain) / GPUS["h100"].kernel_rate


def test_a_divided_backward_is_run_twice(model):
    found = explained(model, 2, "dualpipev").pipeline
    assert found.schedule == "DualPipeV"
    assert found.divisible.seconds < found.mhc.seconds
    assert [stage.rank for stage in found.stages] == [0, 1, 1, 0]


def test_what_cannot_be_piped_is_said(model):
    with pytest.raises(MHCOptionError, match="more than the 9 blocks"):
        explained(model, 8, "DualPipeV")
    with pytest.raises(MHCOptionError, match="valid options are"):
        Pipeline(4, "dualpipe")
    with pytest.raises(MHCOptionError, match="at least as many microbatches as stages"):
        Pipeline(4, "DualPipeV", 4)
    with pytest.raises(MHCOptionError, match="at least 2 ranks"):
        Pipeline(1)


def test_the_command_line():
    arguments = ["explain", "tests.test_pipeline_prediction:example", "--pipeline", "2", "--tokens", "64"]
    shown = CliRunner().invoke(app, [*arguments, "--schedule", "zbvzerobubble", "--network", "25", "--json"])
    pipeline = json.loads(shown.output)["pipeline"]
    assert (pipeline["schedule"], pipeline["network"], pipeline["microbatches"]) == ("ZBVZeroBubble", 25e9, 8)
    alone = CliRunner().invoke(app, ["explain", "llama", "--schedule", "1F1B"])
    assert "--pipeline, which is missing" in alone.output


def example():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, use_cache=False
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
