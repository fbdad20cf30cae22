"""A tiny folder of sources for the funnel, with every fault that files have, and servers that play its models."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image
from test_dicom import write as write_dicom
from test_openai_engine import Answer, Server, completion

from mmedexpert.checks import typed
from mmedexpert.curation.verifier import essentials
from mmedexpert.schema import Config

CONF = Path(__file__).parents[1] / "conf"
GOLD, OTHER = "Tension pneumothorax", "Rib fracture"
OPTIONS = ["Pneumonia", "Pulmonary embolism", GOLD, OTHER]
PRIVATE = ("Jane-Doe-1950", "scan_of_jane_doe", "ward-seven")  # a patient, file names, a folder

# Lines of reasoning that hold as analytical ones, and are no copies of each other.
SOUND = {
    "right": [
        "Air enters the pleural space with each breath and cannot leave, so pressure rises on the left.",
        "The rising pressure collapses the left lung, because no negative pressure opposes its elastic recoil.",
        "It pushes the mediastinum to the right and kinks the great veins, which lowers venous return.",
        "Therefore the tracheal shift and the absent lung markings come from air under pressure: tension pneumothorax.",
    ],
    "busy": [
        "A valve of torn pleura lets gas in during inspiration, so the volume on that side grows breath by breath.",
        "Because the trapped gas is above atmospheric pressure, the lung beside it is compressed and not ventilated.",
        "Compression of the caval veins reduces filling of the heart, which leads to low blood pressure.",
        "Thus dark fields without vessels, and a trachea pushed away, are caused by tension pneumothorax.",
    ],
    "slow": [
        "The left half of the chest is black and shows no vessels, because lung tissue has left the chest wall.",
        "Gas that is trapped there pushes the heart to the other side, which leads to compression of both caval veins.",
        "Less blood therefore returns to the right ventricle, so cardiac output and blood pressure fall.",
        "This mechanism, gas under pressure beside a collapsed lung, is that of a tension pneumothorax.",
    ],
    "sixteen": [
        "When the visceral pleura tears, its elastic recoil makes the lung shrink towards the hilum.",
        "A flap at the tear closes on expiration, so the gas cannot escape and pressure builds up.",
        "Since the mediastinum is mobile, it moves away from the high pressure and drags the trachea along.",
        "Hence the shifted trachea beside an empty hemithorax results from a tension pneumothorax.",
    ],
}  # fmt: skip
BAYESIAN = [
    "Before any finding about 5% of such men have a tension pneumothorax.",
    "Absent lung markings on the left raise the probability of tension pneumothorax from 5% to 50%.",
    "A shifted trachea has a likelihood ratio of 9 and raises it to 90%.",
    "The posterior probability of tension pneumothorax is 90%, so this is the answer.",
]


def ask(mark: str) -> str:
    return f"Case {mark}: a 30-year-old man has sudden chest pain; his film is shown. What is the diagnosis?"


MARK = re.compile(r"Case ([a-z]+):")


def row(mark: str, image: str | None = None, **changes: Any) -> dict[str, Any]:
    made = {
        "id": mark,
        "image": f"{mark}.png" if image is None else image,
        "question": ask(mark),
        "options": OPTIONS,
        "answer": GOLD,
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def noise(seed: int, side: int = 64) -> Image.Image:
    """Clouds of grey: no two are near by a perceptual hash."""
    blocks = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC)


# --- the folder of sources --------------------------------------------------------------------------------------------

EXAM = (
    "A 71-year-old retired carpenter who smoked for forty years comes with three weeks of hoarseness, a swollen face "
    "in the mornings and dilated veins over his chest. Which structure is most likely compressed?"
)
EXAM_OPTIONS = ["Superior vena cava", "Thoracic duct", "Left atrium", "Oesophagus"]
GOOD = (
    "right", "busy", "slow", "sixteen", "wrong", "malformed", "cut", "refused", "drifting", "contrary", "manner",
    "copy", "underived", "unsound", "mute", "hard", "easy", "blindly",
)  # fmt: skip
GOOD_IMAGES = (*GOOD, "shown", "examined", "twins", "named", "yes", "twice")
BROKEN, NO_RECORD = "image cannot be read", "source record cannot be read"
# of what must not stay, its id to step, reason, and a word of the detail
REJECTED = {
    "labelled/marrow/cell-8.png": ("ingest", NO_RECORD, "not an image"),
    "mine/table.jsonl line 6": ("ingest", NO_RECORD, "not JSON"),
    "mine/table.jsonl line 7": ("ingest", NO_RECORD, "no object"),
    "mine/table.jsonl line 8": ("ingest", NO_RECORD, "neither UTF-8 nor UTF-16"),
    "mine/table.jsonl line 9": ("ingest", NO_RECORD, "none of the options"),
    "mine/table.jsonl line 10": ("ingest", NO_RECORD, "question is empty"),
    "mine/table.jsonl line 11": ("ingest", NO_RECORD, "names no image"),
    "mine/twice": ("ingest", NO_RECORD, "the id occurs twice"),  # the first of the two stays
    "mine/gone": ("ingest", NO_RECORD, "gone.png is missing"),
    "mine/outside": ("ingest", NO_RECORD, "../../exam/exam.png is missing"),
    "mine/hollow": ("ingest", BROKEN, "DICOM without pixels"),
    "mine/torn": ("ingest", BROKEN, "truncated"),
    "mine/vast": ("ingest", BROKEN, "8000 x 6500 pixels"),
    "mine/second": ("duplicates", "question asked before", "as mine/right"),
    "mine/yes": ("duplicates", "same question, another answer", "as mine/no"),
    "mine/no": ("duplicates", "same question, another answer", "as mine/yes"),
    "mine/shown": ("decontaminate", "image is in a benchmark", "exam e-2"),
    "mine/examined": ("decontaminate", "8-word passage of a benchmark", "exam e-1"),
    "mine/blank": ("structure", "blank image", "standard deviation 0"),
    "mine/twins": ("structure", "two options say the same", "D and E"),
    "mine/named": ("structure", "question names its answer", GOLD),
}  # fmt: skip
KEPT = {"mine": (*GOOD, "jane", "twice"), "labelled": 8, "reasoning": 2, "phantom": 8}


def make_root(root: Path) -> Path:
    """Sources `ward-seven` (a table), `labelled`, `reasoning`, and the benchmark `exam`; phantoms need no folder."""
    table, exam = root / "ward-seven", root / "exam"
    (table / "images").mkdir(parents=True)
    exam.mkdir()
    for number, mark in enumerate(GOOD_IMAGES):
        noise(number).save(table / "images" / f"{mark}.png")
    wide = np.asarray(noise(3)).astype(np.uint16) * 200
    Image.fromarray(wide).save(table / "images" / "sixteen.png")
    Image.new("L", (64, 64), 128).save(table / "images" / "blank.png")
    Image.new("1", (8000, 6500)).save(table / "images" / "vast.png")
    write_dicom(table / "images" / "hollow.dcm", None, PatientID=PRIVATE[0])
    write_dicom(table / "images" / f"{PRIVATE[1]}.dcm", (np.asarray(noise(90)).astype(np.uint16) + 1) * 8,
                PatientID=PRIVATE[0], PatientName="Doe^Jane")  # fmt: skip
    whole = (table / "images" / "right.png").read_bytes()
    (table / "images" / "torn.png").write_bytes(whole[: len(whole) // 2])
    rows = [
        *map(row, GOOD),
        row("jane", f"{PRIVATE[1]}.dcm", patient=PRIVATE[0]),
        row("twice"), row("twice"),
        row("hollow", "hollow.dcm"), row("torn"), row("vast"), row("gone"), row("outside", "../../exam/exam.png"),
        row("second", "right.png", question=ask("right")),
        row("yes", question="Is the heart enlarged?", options=None, answer="yes"),
        row("no", "yes.png", question="Is the heart enlarged?", options=None, answer="no"),
        row("shown", question="Which part was examined?", options=["Chest", "Hand", "Skull"], answer="Chest"),
        row("examined", question=EXAM, options=EXAM_OPTIONS, answer=EXAM_OPTIONS[0]),
        row("blank"),
        row("twins", options=[*OPTIONS, "rib fracture."]),
        row("named", question="Case named: a tension pneumothorax is seen on this film. What is the diagnosis?"),
    ]  # fmt: skip
    lines = [json.dumps(one).encode() for one in rows]
    lines[5:5] = [
        b'{"id": "half", "image": "right.png", "ques',
        b"[1, 2]",
        json.dumps(row("latin")).encode().replace(b"sudden", b"s\xfcdden"),
        json.dumps(row("nogold", "right.png", answer="Measles")).encode(),
        json.dumps(row("empty", "right.png", question=" ")).encode(),
        json.dumps(row("noimage", "")).encode(),
    ]
    (table / "table.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    noise(80).save(exam / "exam.png")
    noise(81).save(exam / "other.png")
    noise(GOOD_IMAGES.index("shown"), 96).save(exam / "shown.jpg")  # other bytes, other pixels
    told = [
        {"id": "e-1", "image": "exam.png", "question": EXAM, "options": EXAM_OPTIONS, "answer": EXAM_OPTIONS[0]},
        {"id": "e-2", "image": "shown.jpg", "question": "What is seen?", "options": OPTIONS, "answer": GOLD},
    ]
    (exam / "exam.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))

    labelled = root / "labelled" / "marrow"
    labelled.mkdir(parents=True)
    (labelled / "dataset.yaml").write_text(
        "specialties: [oncology_surgery]\nlicense: CC BY-NC 4.0\nmodality: Microscopy\n"
    )
    names = [f"cell-{n}.png" for n in range(9)]
    for number, name in enumerate(names[:8]):
        noise(100 + number).save(labelled / name)
    (labelled / names[8]).write_bytes(b"no picture")
    kinds = ["Blast", "Eosinophil", "Plasma cell", "Monocyte"]
    cells = [f"{name},{kinds[n % 4]}" for n, name in enumerate(names)]
    (labelled / "labels.csv").write_text("\n".join(["file,label", *cells]) + "\n")

    reasoning = root / "reasoning"
    reasoning.mkdir()
    texts = [
        {
            "question": "Which vitamin does a strict vegan most often lack after ten years?", "answer": "B",
            "options": {"A": "Vitamin C", "B": "Vitamin B12", "C": "Vitamin K", "D": "Folic acid"},
            "reasoning": "Plants lack it.",
        },
        {
            "question": "Which electrolyte is lost first when a patient vomits for days?", "answer": "D",
            "options": {"A": "Calcium", "B": "Iron", "C": "Iodine", "D": "Chloride"},
        },
    ]  # fmt: skip
    (reasoning / "texts.json").write_text(json.dumps(texts))
    return root


TABLE = (
    "{_target_: mmedexpert.sources.vqa_table.load, _folder_: %s, files: '%s', "
    "columns: {id: id, image: image, options: options%s}, license: CC0-1.0, name: mine}"
)


def words(root: Path, outputs: Path, *more: str) -> list[str]:
    """The command's overrides."""
    return [
        "stage=data", "data=mmedexpert", f"data.root={root}", f"paths.outputs={outputs}", "logger=none",
        "trainer.accelerator=cpu", "trainer.processes=1", "data.sources.phantom.train=2",
        "+data.sources.mine=" + TABLE % ("ward-seven", "*.jsonl", ", patient: patient"),
        "+data.benchmarks.exam=" + TABLE % ("exam", "exam.jsonl", ""), *more,
    ]  # fmt: skip


def composed(root: Path, outputs: Path, *more: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = words(root, outputs, *more)
        return typed(compose("config", overrides=given), given)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a server that plays all models -----------------------------------------------------------------------------------

DRIFT = "Wait, let me re-read the question."
# of each mark why there is no trace, where it reaches the teacher; the others have one
FAILED = {
    "wrong": ("traces", "no candidate is right"),
    "malformed": ("traces", "no candidate parses"),
    "cut": ("traces", "cut off"),
    "refused": ("traces", "the teacher refuses it"),
    "drifting": ("traces", "its form drifts"),
    "contrary": ("traces", "its steps contradict its answer"),
    "manner": ("traces", "its perspective's rubric does not hold"),
    "copy": ("traces", "near-copy of another trace"),
    "underived": ("traces", "its answer cannot be derived again"),
    "unsound": ("traces", "an essential check fails"),
    "mute": ("traces", "the verifier gives no verdict"),
    "hard": ("difficulty", "never solved in 4"),
    "easy": ("difficulty", "solved in all 4"),
    "blindly": ("needs_image", "solved without its image"),
    "jane": ("traces", "no candidate parses"),
    "twice": ("traces", "no candidate parses"),
}
ROLES = {"labels": "labeller", "blind": "blind", "difficulty": "solver", "teacher": "teacher", "verifier": "verifier"}
REFUSAL: Answer = (400, {}, b'{"error": {"message": "not about people"}}')


class Models(Server):
    """One server with a model for each step; `given` counts the completions it gave, by model, prompt and sample."""

    def __init__(self) -> None:
        super().__init__()
        names = [{"id": name, "object": "model"} for name in ROLES.values()]
        self.models = (200, {}, json.dumps({"object": "list", "data": names}).encode())
        self.answer = self.play
        self.given: Counter[tuple[str, str, int]] = Counter()
        self.tried: Counter[tuple[str, str, int]] = Counter()
        self.die_after: int | None = None  # completions

    def asked_by(self, *more: str) -> list[str]:
        """Overrides that have the funnel ask it."""
        ends = [f"data.curate.{key}.{what}" for key, name in ROLES.items() for what in (
            f"base_url={self.base_url}", f"model={name}", "timeout_s=3", "concurrency=4", "retries=2")]  # fmt: skip
        return [
            *ends, "data.curate.blind.tries=2", "data.curate.difficulty.rollouts=4",
            "data.curate.difficulty.keep=[1,3]", "data.curate.difficulty.hard=[1,2]",
            "data.curate.teacher.candidates=2", "data.curate.teacher.perspectives=[analytical]", *more,
        ]  # fmt: skip

    def play(self, prompt: str, before: int, body: dict[str, Any]) -> Answer:
        key = (body["model"], prompt, body.get("seed", 0))
        with self.lock:
            first = not self.tried[key]
            self.tried[key] += 1
        found = getattr(self, body["model"])(prompt, body.get("seed", 0), first, body)
        if found[0] == 200:
            with self.lock:
                self.given[key] += 1
                if self.given.total() == self.die_after:
                    self.die()
        return found

    def die(self) -> None:
        """Connections are refused from now on."""
        self.http.socket.close()

    def revive(self) -> None:
        """At the same address."""
        kind, address, handler = type(self.http), self.http.server_address, self.http.RequestHandlerClass
        self.http = kind(address, handler)  # type: ignore[call-arg]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.die_after = None

    def teacher(self, prompt: str, sample: int, first: bool, body: dict[str, Any]) -> Answer:
        mark, gold, other = _read(prompt)
        if mark == "busy" and first:
            return 429, {"Retry-After": "0"}, b"busy"
        if mark == "slow" and first:
            self.quit.wait(3.5)  # longer than the client waits
            return 503, {}, b"too late"
        if mark == "refused":
            return REFUSAL
        if mark == "cut":
            return completion('{"steps": ["Air', "length")
        steps = SOUND.get(mark, SOUND["right"])
        if mark == "drifting":
            steps = [*steps[:2], DRIFT, *steps[2:]]
        if mark == "contrary":
            steps = [*steps[:3], f"So the answer is {other}."]
        if mark == "manner":
            steps = BAYESIAN
        if mark in ("", "malformed", "jane", "twice"):
            return completion("I would say that it is a pneumothorax.")
        wrong = mark == "wrong" or (mark == "sixteen" and sample == 0)
        return completion(json.dumps({"steps": steps, "answer": other if wrong else gold}))

    def verifier(self, prompt: str, sample: int, first: bool, body: dict[str, Any]) -> Answer:
        mark, gold, other = _read(prompt)
        if mark == "mute":
            return completion("Hm.")
        if body["response_format"]["json_schema"]["name"] == "derivation":
            return completion(json.dumps({"answer": other if mark == "underived" else gold}))
        return completion(json.dumps(dict.fromkeys(essentials(), True) | {"clinical_validity": mark != "unsound"}))

    def blind(self, prompt: str, sample: int, first: bool, body: dict[str, Any]) -> Answer:
        mark, gold, _ = _read(prompt)
        return completion(f"<think>A guess.</think><answer>{gold if mark == 'blindly' else 'A'}</answer>")

    def solver(self, prompt: str, sample: int, first: bool, body: dict[str, Any]) -> Answer:
        """Right in some samples; of what it does not know it names one option after the other."""
        mark, gold, other = _read(prompt)
        letter = (
            "ABCD"[sample % 4] if not mark else gold if mark == "easy" or (mark != "hard" and sample < 2) else other
        )
        return completion(f"<think>Seen.</think><answer>{letter}</answer>")

    def labeller(self, prompt: str, sample: int, first: bool, body: dict[str, Any]) -> Answer:
        return completion('{"primary": "adult_medicine", "others": [], "reason": "an adult"}')


def _read(prompt: str) -> tuple[str, str, str]:
    """The mark in a prompt, and under which letters it shows the gold and another option."""
    mark = MARK.search(prompt)
    told = re.search(r"^Options: (\{.*\})$", prompt, re.MULTILINE)
    options = json.loads(told[1]) if told else dict(re.findall(r"^([A-E])\. (.+)$", prompt, re.MULTILINE))
    letter_of = {text: letter for letter, text in options.items()}
    return mark[1] if mark else "", letter_of.get(GOLD, ""), letter_of.get(OTHER, "")
