"""The tables of the upcycling runs, on rows whose differences are known."""

from benchmarks import upcycle
from benchmarks.upcycle_child import PLAIN


def _row(name, seed, held_out, **more):
    scalars = {"mhc_similarity": 1.0, "mhc_moved": 0.5, "mhc_gain_forward": 1.0, "mhc_gain_backward": 1.0}
    rates = {"rates": None} if name == PLAIN else {"rates": [1, 1, 1], **scalars}
    return {"name": name, "seed": seed, "held_out": held_out, **rates, **more}


ROWS = [
    _row(PLAIN, 0, [1.0, 3.0]),
    _row("slow", 0, [1.1, 3.3]),
    _row("fast", 0, [0.9, 2.7]),
    _row(PLAIN, 1, [2.5, 2.5]),
    _row("fast", 1, [2.6, 2.6]),
    # A later seed does not choose.
    _row("slow", 1, [0.0, 0.0]),
]


def test_the_first_seed_chooses_and_each_seed_is_compared_with_its_own_plain_model():
    search, final = upcycle.tables({"rows": ROWS, "facts": {"steps": 1, "batch": 1, "length": 2}})
    assert [row[:3] for row in search.rows] == [
        ("fast", "1.8000", "-0.2000 ± 0.1000"),
        (PLAIN, "2.0000", "–"),
        ("slow", "2.2000", "+0.2000 ± 0.1000"),
    ]
    assert search.best == {0}
    assert final.rows == (("0", "2.0000", "1.8000", "-0.2000"), ("1", "2.5000", "2.6000", "+0.1000"))
    assert "Mean -0.0500 ± 0.2121" in final.note


def test_without_the_packages_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(upcycle, "model_file", lambda: (_ for _ in ()).throw(upcycle.MHCError("two packages")))
    record = upcycle.Record("upcycle", tmp_path / "upcycle.json")
    upcycle.run(upcycle.Options("cpu"), record)
    assert record.content["skipped"] == [{"case": "everything", "why": "two packages"}]
