"""README.md and docs/: every file, function and flag that they name exists, what they quote is the code, the tables are those of
docs/claim.jsonl, and the README's commands and snippets run in a tiny setting."""
import ast
import re
import subprocess
import sys

import claim
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_end_to_end import TINY, run

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = ("data.py", "denoise.py", "model.py", "distill.py", "train.py", "evaluate.py")
TORCHRUN = {"--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint"}


def defined(file):
    """Names of a module's functions, classes and their methods."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names |= {node.name, *(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), [link for link in links if not (page.parent / link).exists()]


def test_functions_are_where_the_readme_says():
    named = re.findall(r"\[`([\w.]+)`(?: in \w+\.py)?\]\((\w+\.py)\)", README)
    named = [(name, file) for name, file in named if name != file]
    assert len(named) >= 12
    for name, file in named:
        assert name in defined(file), f"{name} is not in {file}"


def test_files_import_as_the_readme_draws_it():
    steps = [re.findall(r"\w+\.py", step) for step in re.search(r"^    data\.py  <-.*$", README, re.MULTILINE)[0].split("<-")]
    assert sorted(sum(steps, [])) == sorted(FILES)
    for n, step in enumerate(steps):
        for file in step:
            ours = set(re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / file).read_text(), re.MULTILINE)) & {name[:-3] for name in FILES}
            assert ours <= {name[:-3] for name in sum(steps[:n], [])}, file


def test_quoted_lines_are_the_codes():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    code = {line.strip() for file in FILES for line in (ROOT / file).read_text().splitlines()}
    for line in "\n".join(blocks).splitlines():
        assert not line.strip() or line.strip() in code, line


def test_every_flag_exists():
    known = set(TORCHRUN)
    scripts = (["train.py"], ["denoise.py"], ["evaluate.py"], ["data.py", "crop"], ["tests/benchmark.py", "scale"], ["tests/benchmark.py", "denoise"],
               ["tests/benchmark.py", "step"], ["tests/claim.py"])
    for script in scripts:
        text = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(r"--[\w-]+", text))
    for page in PAGES:
        wrong = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", re.sub(r"<!--.*?-->", "", page.read_text()))) - known
        assert not wrong, f"{page.name} names {wrong}"


def test_the_tables_are_printed_from_the_runs():
    for page in claim.PAGES:
        assert claim.fill(page.read_text(), claim.results()) == page.read_text(), f"{page.name}: python tests/claim.py --tables"
    assert set(claim.results()) <= set(claim.commands())


def test_the_commands_run(walkers, market, tmp_path):
    """Every command of the README that needs no several processes or machines, on ten people and for a few steps; its snippets after it."""
    from torchvision.io import encode_jpeg

    (tmp_path / "street.mp4").mkdir()  # a folder of frames, which needs no av
    for n in range(1, 7):
        noise = torch.randint(0, 256, (3, 90, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        (tmp_path / "street.mp4" / f"{n:06d}.jpg").write_bytes(encode_jpeg(noise).numpy().tobytes())
    (tmp_path / "street.txt").write_text("".join(f"{n},{track},{20 * track},10,20,50,1,-1,-1,-1\n" for n in range(1, 7) for track in range(7)))
    (tmp_path / "Market-1501-v15.09.15").symlink_to(market)
    (tmp_path / "DIR").mkdir()
    for name in ("train", "test", "train.json", "test.json"):
        (tmp_path / "DIR" / name).symlink_to(walkers / name)
    ran = []
    for line in re.findall(r"^(?:    |pip install -r requirements.txt && )((?:python|torchrun) .*?\.py.*?) *(?:#.*)?$", README, re.MULTILINE):
        if "MSMT17" in line or "--nnodes" in line or "tests/" in line or "--max-restarts" in line:
            continue  # other layouts and launchers have their own tests
        if "FILE.npy" in line:
            index = run(tmp_path, "denoise.py", "--data", "DIR", "--index").split()
            np.save(tmp_path / "FILE.npy", np.random.default_rng(0).standard_normal((len(index), 8)).astype(np.float32))
        for placeholder, value in (("r50ibn", "r10ibn"), ("runs/NAME/", "runs/DIR-r10ibn/"), ("--weights FILE", "--weights runs/DIR-r10ibn/last.pt")):
            line = line.replace(placeholder, value)
        words = line.split()
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        flags = words[script + 1 :]
        if words[script] == "train.py":
            flags += [word for word in TINY if word not in ("--recipe", "demo", "--arch", "r10ibn")] + ["--recipe", "demo"] + ([] if "--data" in flags else ["--data", str(walkers), "--name", "walkers-r10ibn"])
        output = run(tmp_path, words[script], *flags, *(["--export", "FILE.npz"] if "Market" in line and "FILE.npz" not in str(ran) else []))
        assert output
        ran.append(f"{line} FILE.npz" if "Market" in line else line)
    assert sum("train.py" in line for line in ran) >= 2 and {"data.py", "denoise.py", "evaluate.py"} <= {word for line in ran for word in line.split()}

    snippets = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    snippets = ["".join(line[4:] for line in snippet.splitlines(keepends=True)).replace("DIR-r50ibn", "DIR-r10ibn")
                for snippet in snippets if re.match(r"    (import|from) ", snippet)]
    assert len(snippets) >= 3
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch
from data import read_tracklets
from model import build
os.makedirs("labels", exist_ok=True)
t = read_tracklets("DIR/train")
video, track, frame = t.video, t.track, t.frame
features = np.random.default_rng(0).standard_normal((len(t), 16)).astype(np.float32)
images, your_resnet50_ibn = torch.zeros(2, 3, 32, 16), build("r10ibn")
"""
    (tmp_path / "snippets.py").write_text(program + "\n".join(snippets))
    result = subprocess.run([sys.executable, "snippets.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
