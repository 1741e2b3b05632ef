"""README.md and docs/: every file, function and flag that they name exists, the tables are those of
docs/claim.jsonl, and the README's commands run in a tiny setting."""
import ast
import importlib
import re

import claim
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torchvision.io import encode_jpeg

README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("data", "denoise", "model", "distill", "train", "evaluate")
PROGRAMS = ("train.py", "denoise.py", "evaluate.py", "model.py", "tests/claim.py")
PROGRAMS += ("data.py crop", "data.py tracklets")
BENCHMARKS = ("denoise", "scale", "loss", "step", "networks", "evaluate")
TORCHRUN = set(
    "--nproc_per_node --nnodes --max-restarts --standalone --rdzv-backend --rdzv-endpoint".split()
)


def call(monkeypatch, program, *flags):
    """Run a program's main in this process: "data.py crop" with these flags."""
    script, *words = program.split()
    monkeypatch.setattr("sys.argv", [script, *words, *flags])
    importlib.import_module(script.removeprefix("tests/").removesuffix(".py")).main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_readme_can_be_read_in_ten_minutes():
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 2500


def test_functions_are_where_the_readme_says():
    named = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)\)", README)
    named = [(name, file) for name, file in named if name != file]
    assert len(named) >= 12
    for name, file in named:
        body = ast.parse((ROOT / file).read_text()).body
        assert name in {getattr(node, "name", "") for node in body}, f"{name} is not in {file}"


def test_files_import_as_the_readme_draws_it():
    """From the left only; in one step of the drawing, from those before too."""
    steps = re.search(r"^    data\.py  <-.*$", README, re.MULTILINE)[0].split("<-")
    order = re.findall(r"(\w+)\.py", " ".join(steps))
    assert sorted(order) == sorted(MODULES)
    for n, module in enumerate(order):
        text = (ROOT / f"{module}.py").read_text()
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert imported & set(MODULES) <= set(order[:n]), module


def test_every_flag_exists(monkeypatch, capsys):
    known = TORCHRUN.copy()
    programs = [*PROGRAMS, *(f"tests/benchmark.py {name}" for name in BENCHMARKS)]
    for program in programs:
        with pytest.raises(SystemExit):
            call(monkeypatch, program, "--help")
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        text = re.sub(r"<!--.*?-->", "", page.read_text())
        wrong = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", text)) - known
        assert not wrong, f"{page.name} names {wrong}"


def test_the_tables_are_printed_from_the_runs():
    for page in claim.PAGES:
        text = page.read_text()
        assert claim.fill(text) == text, f"{page.name}: tests/claim.py --tables"


def test_missing_runs_are_made_where_their_weights_are_and_become_lines(tmp_path, monkeypatch):
    made = []
    files = {name: tmp_path / f"{name}.jsonl" for name in claim.FILES}
    for name, value in {
        "ROOT": tmp_path,
        "FILES": files,
        "ProcessPoolExecutor": claim.ThreadPoolExecutor,
        "rank_colours": len,
        "run": lambda line, histogram, file, flags: made.append((line, file)) or True,
    }.items():
        monkeypatch.setattr(claim, name, value)
    wanted = [line for line in claim.finetuning_commands("") if "--seed 1" in line]
    known = wanted[0]
    files["finetuning"].write_text('{"command": "%s"}\n' % known)
    weights = wanted[1].split("--weights ")[1]
    (tmp_path / weights).parent.mkdir(parents=True)
    (tmp_path / weights).touch()
    monkeypatch.setattr("sys.argv", ["claim.py", "--finetune", "--seed 1"])
    claim.main()
    ready = [line for line in wanted if "--weights" not in line or weights in line]
    assert made == [(line, files["finetuning"]) for line in ready if line != known]


@pytest.fixture
def user(few, market, tmp_path, monkeypatch):
    """A folder in which the README's names mean something tiny."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(few)
    (tmp_path / "Market-1501-v15.09.15").symlink_to(market)
    (tmp_path / "street.mp4").mkdir()  # a folder of frames, which needs no av
    rows = []
    for n in range(1, 4):
        noise = torch.randint(0, 256, (3, 90, 160), dtype=torch.uint8)
        jpeg = encode_jpeg(noise).numpy().tobytes()
        (tmp_path / "street.mp4" / f"{n:06d}.jpg").write_bytes(jpeg)
        rows += [f"{n},{track},{20 * track},10,20,50,1,-1,-1,-1\n" for track in range(7)]
    (tmp_path / "street.txt").write_text("".join(rows))
    return tmp_path


def commands(text):
    """The indented commands of a page, without what launches them and without remarks."""
    lines = re.findall(r"^    (?:python|torchrun)( .*)$", text, re.MULTILINE)
    for line in lines:
        if "--nnodes" not in line and "MSMT17" not in line and "MOT17" not in line:
            line = re.sub(r"#.*| --nproc_per_node=\d| --max-restarts=\d", "", line)
            yield line.replace("r50ibn", "r10ibn").replace("NAME", "DIR-r10ibn").split()


@pytest.mark.parametrize("page", ["README", "usage"])
def test_the_commands_run(page, user, few, in_process):
    """Every command that needs no other machines; in docs/usage.md, those that come after it."""
    if page == "usage":
        in_process("train.py", "--data", "DIR", *TINY, "--name", "DIR-r10ibn")
    ran = []
    for script, *flags in commands({"README": README, "usage": USAGE}[page]):
        if script == "tests/claim.py" or "--index" in flags:
            continue
        if script == "train.py":
            flags += [*TINY, "--name", "DIR-r10ibn"]
        if "FILE.npy" in flags:
            features = np.load("labels/first.features.npy").astype(np.float32)
            np.save("FILE.npy", features)
        if "FILE" in flags:
            flags[flags.index("FILE")] = "runs/DIR-r10ibn/last.pt"
        if "street.mp4" in flags:
            flags[flags.index("DIR")] = "crops"
        if "tracklets" in flags:
            flags += ["--held", 2]
        if flags[:1] in (["crop"], ["export"], ["tracklets"]):
            script = f"{script} {flags.pop(0)}"
        in_process(script, *flags)
        ran.append(script)
    least = {"README": {"data.py crop", "evaluate.py", "train.py"}, "usage": {"denoise.py"}}
    assert set(ran) >= least[page]


def test_the_snippets_run(user, in_process):
    """The Python of docs/usage.md, with what it takes for given."""
    in_process("train.py", "--data", "DIR", *TINY, "--name", "walkers-r10ibn")
    data = importlib.import_module("data")
    t = data.read_tracklets("DIR/train")
    random = np.random.default_rng(0)
    features = random.standard_normal((len(t), 16)).astype(np.float32)
    given = {"features": features, "video": t.video, "track": t.track, "frame": t.frame}
    given |= {"images": torch.zeros(2, 3, 64, 32), "query": features[:9], "gallery": features}
    given |= {"query_ids": t.track[:9], "gallery_ids": t.track}
    given |= {"query_cams": t.frame[:9], "gallery_cams": t.frame}
    snippets = re.findall(r"(?:^    .*\n)+", USAGE, re.MULTILINE)
    snippets = [re.sub("^    ", "", text, flags=re.MULTILINE) for text in snippets]
    snippets = [text for text in snippets if re.match("(import|from) ", text)]
    assert len(snippets) == 3
    for text in snippets:
        exec(text, given)
    assert given["labels"].shape == (len(t),) and 0 < given["result"]["mAP"] <= 1
