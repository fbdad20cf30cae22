"""`stage=eval` on pairs of answers as a user runs it: the published layout, a served judge, the controls, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run
from preferring import benchmark, rows_of, verdict, write
from test_openai_engine import Server, completion

from mmedexpert.data.pairs import DIMENSIONS, pair_of
from mmedexpert.errors import UserError
from mmedexpert.runtime.inventory import runs_in
from mmedexpert.sources import preference_pairs
from mmedexpert.sources.med_rewardbench import load

PAIRS = ["stage=eval", "benchmark=med_rewardbench", "model.max_new_tokens=64"]


@pytest.fixture()
def server():
    one = Server()
    yield one
    one.quit.set()
    one.http.shutdown()
    one.http.server_close()


def asked_of(server: Server, root: Path, *more: str) -> list[str]:
    where = [f"benchmark.med_rewardbench.root={root}", f"engine.endpoint.base_url={server.base_url}"]
    return [*PAIRS[:2], "engine=openai", "engine.endpoint.model=m", "engine.endpoint.max_new_tokens=64", *where, *more]


def metrics(outputs: Path, judge: str) -> dict[str, float]:
    (path,) = outputs.glob(f"verdicts/{judge}-med_rewardbench-*/metrics.json")
    return json.loads(path.read_text())


def test_a_served_judge_beside_the_controls(tmp_path, server):
    """A judge that always says A: half right on average, never in both orders, and told so."""
    server.answer = lambda prompt, before, body: completion(verdict("A"))
    root = benchmark(tmp_path / "files")
    done = run(tmp_path / "out", *asked_of(server, root))
    found = metrics(tmp_path / "out", "m")
    for name in DIMENSIONS:
        assert found[f"acc_avg/{name}"] == 0.5 and found[f"acc_strict/{name}"] == 0
    assert found["consistency"] == 0 and found["position_bias"] == 0.5 and found["invalid_rate"] == 0
    first = metrics(tmp_path / "out", "always_first")
    assert {key: first[key] for key in found if "/" not in key} == {key: found[key] for key in found if "/" not in key}
    assert metrics(tmp_path / "out", "longer_answer")["consistency"] == 1
    assert {"m", "always_first", "random", "longer_answer", "rubrics"} <= {
        path.name.partition("-")[0] for path in (tmp_path / "out/verdicts").iterdir() if path.is_dir()
    }  # fmt: skip
    for text in (
        "Judges on med_rewardbench",
        "protocol pairwise; 9 pairs",
        "Against m",
        "position bias",
        "By dimension",
    ):
        assert text in done.stdout
    (folder,) = (tmp_path / "out/verdicts").glob("m-*/")
    table = (folder / "table.md").read_text()
    assert table.count("\n") == 4 and "| brain | 4 |" in table and "| heart | 5 |" in table  # head, rule, two organs
    assert (folder / "table.png").stat().st_size > 10_000
    requests = len(server.bodies)
    assert requests == 18  # nine pairs, both orders
    image = next(part for part in server.bodies[-1]["messages"][-1]["content"] if part["type"] == "image_url")
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert server.bodies[-1]["messages"][-1]["content"][-1]["type"] == "text"  # after the image
    run(tmp_path / "out", *asked_of(server, root))
    assert len(server.bodies) == requests  # all found again


def test_their_protocol_asks_once_and_reads_as_they_do(tmp_path, server):
    server.answer = lambda prompt, before, body: completion("Assistant one gives a better description")
    root = benchmark(tmp_path / "files")
    run(tmp_path / "out", *asked_of(server, root, "protocol=med_rewardbench"))
    found = metrics(tmp_path / "out", "m")
    assert found["invalid_rate"] == 0 and "acc_strict/overall" not in found
    gold = [row["human_answer"] for counts in (("brain", 4, 0), ("heart", 5, 4)) for row in rows_of(*counts)[0]]
    for name in DIMENSIONS:
        assert found[f"acc_single/{name}"] == pytest.approx(sum(one[name] == "A" for one in gold) / 9)
    done = run(tmp_path / "out", *asked_of(server, root, "protocol=pairwise"))
    found = [path for path in (tmp_path / "out").glob("verdicts/m-*/summary.json")]
    ours = next(one for path in found if (one := json.loads(path.read_text()))["protocol"] == "pairwise")
    assert ours["invalid_rate"]["value"] == 1 and ours["rules"] == {"no verdict": 18} and "100.0" in done.stdout


def test_a_local_model_judges_with_and_without_the_images(tmp_path):
    root = benchmark(tmp_path / "files", eye=2)
    given = [f"benchmark.med_rewardbench.root={root}", "eval.image_blind=true", "model.instructions=full"]
    run(tmp_path / "out", *PAIRS[:2], *given, "model.max_new_tokens=8")
    paths = [
        next((tmp_path / "out/verdicts").glob(f"{name}-med_rewardbench-*/judgements.jsonl"))
        for name in ("base", "base-image_blind")
    ]
    seeing, blind = ([json.loads(line) for line in path.open()] for path in paths)
    assert len(seeing) == len(blind) == 4
    assert {row["prompt_sha256"] for row in seeing}.isdisjoint({row["prompt_sha256"] for row in blind})
    assert metrics(tmp_path / "out", "base").keys() >= {"consistency", "position_bias", "invalid_rate"}


def test_what_would_be_no_judge_is_told(tmp_path, server):
    root = f"benchmark.med_rewardbench.root={benchmark(tmp_path / 'files', eye=1)}"
    out = tmp_path / "out"
    assert "asks a judge" in run(out, *PAIRS, root, "eval.models=[blank_image]", code=2).stderr
    served = asked_of(server, tmp_path / "files", "engine.endpoint.model=some/random")
    server.models = (200, {}, json.dumps({"object": "list", "data": [{"id": "some/random"}]}).encode())
    given = [word for word in served if word != "engine.endpoint.model=m"]
    assert "may not be called random" in run(out, *given, code=2).stderr
    assert "is of pairs of answers" in run(out, "stage=eval", "protocol=pairwise", "eval.models=[base]", code=2).stderr
    assert "eval.image_blind is not read here" in run(
        out, "stage=eval", "eval.models=[base]", "eval.image_blind=true", code=2
    ).stderr  # fmt: skip
    told = run(out, *asked_of(server, tmp_path / "files", "model.instructions=full"), code=2).stderr
    assert "model.instructions is not read here: engine=openai asks the one model" in told


def test_two_sets_of_pairs_and_one_of_questions_in_one_command(tmp_path):
    (tmp_path / "own").mkdir()
    row = {"id": "a", "question": "q", "answer_a": "x", "answer_b": "y", "labels": {"overall": "tie"}}
    (tmp_path / "own/pairs.jsonl").write_text(json.dumps(row) + "\n")
    root = benchmark(tmp_path / "files", eye=1)
    given = [f"benchmark.med_rewardbench.root={root}", f"benchmark.preference_pairs.root={tmp_path / 'own'}"]
    done = run(
        tmp_path / "out", "stage=eval", "benchmark=[med_rewardbench,preference_pairs]", *given, "model.max_new_tokens=8"
    )
    assert "Judges on med_rewardbench" in done.stdout and "Judges on preference_pairs" in done.stdout
    assert "nan" not in done.stdout
    listed = {one.name: one.number for one in runs_in(tmp_path / "out") if one.stage == "verdicts"}
    assert listed["always_first-preference_pairs"] == "acc_single/mean 0" and len(listed) == 10
    done = run(tmp_path / "out", "stage=eval", "benchmark=[med_rewardbench]", given[0], "model.max_new_tokens=8",
               "runs.explain=true")  # fmt: skip
    assert "reused" in done.stdout and "Judges on" not in done.stdout


def test_the_published_layout_is_read(tmp_path):
    records, image_root, bad = load(benchmark(tmp_path / "files"), tmp_path / "out")
    pairs = [pair_of(record) for record in records]
    assert bad == [] and [one.id for one in pairs] == [f"brain-{i}" for i in range(4)] + [
        f"heart-{i}" for i in range(4, 9)
    ]
    assert pairs[2].labels == dict(zip(DIMENSIONS, "AABBBB", strict=True)) and pairs[2].part == "brain"
    assert pairs[2].answers == {"A": "It shows a mass 2.", "B": "It shows no mass 2, and it is a long answer."}
    assert (image_root / pairs[2].images[0]).is_file() and pairs[2].specialty == "brain_sensory"
    extra = image_root.parent.parent / "files/data/pair_gt_all/parquet/foot.parquet"
    pq.write_table(pa.Table.from_pylist(rows_of("foot", 1)[1]), extra)
    assert load(tmp_path / "files", tmp_path / "three")[2] == [
        ("foot", "foot.parquet has no foot.jsonl with its labels")
    ]
    extra.unlink()
    inner = tmp_path / "files/data"
    assert [one.id for one in load(inner, tmp_path / "two")[0]] == [one.id for one in records]


def left_out(tmp_path: Path, labels, answers) -> dict[str, str]:
    return dict(load(write(tmp_path / "files", "eye", labels, answers), tmp_path / "out")[2])


def test_what_cannot_be_asked_is_left_out_with_its_reason(tmp_path):
    labels, answers = rows_of("eye", 8)
    labels[1]["human_answer"]["overall"] = "C"
    del labels[2]["human_answer"]["creativity"]
    labels.append(labels[3])
    answers.append(answers[4])
    answers[5]["image"] = {"bytes": b"", "path": None}
    answers[6]["answer2_text"] = ""
    labels.append({"question_id": "8", "human_answer": {**labels[0]["human_answer"], "Overall": "A"}})
    del labels[-1]["human_answer"]["overall"]
    answers.append({**answers[0], "question_id": "8"})
    answers.append({**answers[0], "question_id": None})
    del answers[7]
    found = left_out(tmp_path, labels, [*answers, {**answers[0], "question_id": "77"}])
    assert set(found) == {f"eye-{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 77)} | {"eye row 9"}
    for name, said in {
        "eye-1": "the label of overall is 'C': A or B", "eye-2": "all of accuracy, relevance", "eye-3": "stands twice",
        "eye-4": "stands twice", "eye-5": "no image", "eye-6": "answer B is empty", "eye-7": "no such question_id",
        "eye-77": "has no label", "eye-8": "all of accuracy", "eye row 9": "no question_id",
    }.items():  # fmt: skip
        assert said in found[name], name


def test_a_folder_that_is_another_is_one_clear_line(tmp_path, server):
    root = benchmark(tmp_path / "files")
    (root / "data/pair_gt_all/parquet/heart.parquet").rename(tmp_path / "heart.parquet")
    done = run(tmp_path / "out", *asked_of(server, root), code=2)
    assert "heart.jsonl has no" in done.stderr and "download that, too" in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1 and server.bodies == []
    (root / "data/pair_gt_all/parquet/heart.parquet").write_bytes(b"PAR1 cut")
    assert "truncated or no Parquet file" in run(tmp_path / "out", *asked_of(server, root), code=2).stderr
    shutil.rmtree(root / "data")
    assert "holds no data/pair_gt_all" in run(tmp_path / "out", *asked_of(server, root), code=2).stderr
    done = run(tmp_path / "out", *asked_of(server, benchmark(root), "protocol=medevalkit"), code=2)
    assert "holds pairs of answers; use pairwise, med_rewardbench or auto" in done.stderr
    with pytest.raises(UserError, match="has no column"):
        path = root / "data/pair_gt_all/parquet/brain.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["answer1_text"]), path)
        load(root, tmp_path / "other")


def test_pairs_of_ones_own_have_ties_several_images_and_missing_dimensions(tmp_path):
    both = {"question": "q", "images": ["1.png", "2.png"]}
    rows = [
        {"id": "a", "answer_a": "x", "answer_b": "y", "labels": {"overall": "tie"}, **both},
        {"id": "b", "answer_a": "x", "answer_b": "z", "labels": {"accuracy": "B"}, "question": "q", "organ": "eye",
         "group": "P1"},
        {"id": "c", "answer_a": "x", "answer_b": "y", "labels": {"overall": "first"}, "question": "q"},
        {"id": "a", "answer_a": "v", "answer_b": "w", "labels": {"overall": "A"}, "question": "q"},
        {"id": "d", "answer_a": "y", "answer_b": "x", "labels": {"overall": "tie"}, **both},
        ["no object"],
        {"id": "e", "question": "q", "answer_a": "x", "labels": {"overall": "A"}},
        {**both, "id": "f", "answer_a": "x", "answer_b": "y", "labels": {"overall": "A"}, "images": "../x.png"},
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, root, bad = preference_pairs.load(tmp_path, tmp_path / "out")
    assert root == tmp_path and [record.id for record in records] == ["a", "b"]
    first, second = map(pair_of, records)
    assert first.images == ("1.png", "2.png") and first.labels == {"overall": "tie"}
    assert second.group == "P1" and second.part == "eye" and second.images == ()
    reasons = dict(bad)
    assert "the label of overall is 'first'" in reasons["pairs.jsonl line 3"]
    assert "its id stands twice" in reasons["pairs.jsonl line 4"] and "folded" in reasons["d"]
    assert "answer B is empty" in reasons["pairs.jsonl line 7"] and "below the folder" in reasons["pairs.jsonl line 8"]
    with pytest.raises(UserError, match=r"other\.jsonl is not there"):
        preference_pairs.load(tmp_path, tmp_path / "out", file="other.jsonl")
