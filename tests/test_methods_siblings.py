"""`diff methods/naive_ft.py methods/x.py` is the method and nothing else."""

import ast
import builtins
import copy
import difflib
import re

import pytest
import torch
from conftest import ROOT

NAIVE = (ROOT / "methods" / "naive_ft.py").read_text()
SIBLINGS = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "naive_ft")
ARGS = "class Args(Training, data.TaskArgs, runs.RunArgs):"
SCHEDULER = "scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)"
DECAY = "weight_decay: float = 5e-4  # on every parameter that trains"
LOSS = "loss = F.cross_entropy(model(images), labels)"
STEPS = "for step in range(run.steps, epoch * args.steps_per_epoch):"
RESUME = "run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)"
LOAD = "task = data.load_task(args)"
BATCHES = "batches = task.target_train.batches(args.batch_size, device, args.seed, args.augment, args.resident)"
START, EVALUATE = "run.start(model)", "run.evaluate(epoch, model)"
COUNT = "run.step(loss, images)"
UPDATE = ["scaler.unscale_(optimizer)", "torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)"]
UPDATE += ["scaler.step(optimizer)", "scaler.update()", "scheduler.step()"]
# The lines of naive_ft's main block that a method may replace. Anything else it can only add to.
MAY_REPLACE = {
    "bn_adapt": [
        ARGS,
        LOAD,
        BATCHES,
        LOSS,
        "model.train()",
        'layer.train(args.bn_mode == "train")',
        "optimizer.zero_grad()",
        "scaler.scale(loss).backward()",
        *UPDATE,
    ],
    "frozen_classifier": [],
    "grad_proj": [ARGS, LOSS, "optimizer.zero_grad()", "scaler.scale(loss).backward()", RESUME, COUNT],
    "ht_distill": [ARGS, LOSS, START, RESUME, EVALUATE],
    "infomax": [ARGS, LOAD, LOSS, RESUME],
    "l2_sp": [ARGS, DECAY],
    "lolsgd": [ARGS, SCHEDULER, LOSS, STEPS, RESUME, "images, labels = batches(step)", COUNT],
    "lp_ft": [ARGS],
    "masked_ft": [ARGS, LOSS],
    "wise_ft": [ARGS, "run.finish(model)"],
}


def without_header(text):
    return text[text.index("import copy") :].splitlines()


@pytest.mark.parametrize("method", SIBLINGS)
def test_boilerplate_is_the_same_to_the_letter(method):
    text = (ROOT / "methods" / f"{method}.py").read_text()
    removed = [
        line[2:].strip() for line in difflib.ndiff(without_header(NAIVE), without_header(text)) if line[:2] == "- "
    ]
    removed = [line for line in removed if line and not line.startswith("from eval import")]
    assert not set(removed) - set(MAY_REPLACE[method]), "the diff to naive_ft changes more than the method"


@pytest.mark.parametrize("method", SIBLINGS)
def test_a_script_is_read_in_one_go(method):
    assert len((ROOT / "methods" / f"{method}.py").read_text().splitlines()) <= 175


def own_flags(method):
    """The names of the flags that only this script has."""
    tree = ast.parse((ROOT / "methods" / f"{method}.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Method"]
    return [field.target.id for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]


@pytest.mark.parametrize("method", ["naive_ft", *SIBLINGS])
def test_every_field_and_function_says_what_it_is(method):
    text = (ROOT / "methods" / f"{method}.py").read_text()
    tree = ast.parse(text)
    header = ast.get_docstring(tree)
    assert f"python methods/{method}.py" in header and ("arXiv" in header or "KDD" in header)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef) and node.name in ("Method", "Training"):
            lines = [text.splitlines()[field.lineno - 1] for field in node.body]
            assert all(isinstance(field, ast.AnnAssign) for field in node.body)
            assert all(re.search(r"  # \w.{3,}", line) for line in lines), "what --help says of a flag"


@pytest.mark.parametrize("method", ["naive_ft", *SIBLINGS])
def test_what_people_copy_needs_torch_alone(method):
    """The functions above the main block run where torch is all that is imported, and take no args and no run."""
    tree = ast.parse((ROOT / "methods" / f"{method}.py").read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kept += [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases and node.name != "Args"]
    space = {"torch": torch, "F": torch.nn.functional, "copy": copy}
    exec(compile(ast.Module(kept, []), method, "exec"), space)
    known = set(space) | set(dir(builtins))
    for node in kept:
        names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
        given = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        given |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
        assert not {name.id for name in names} - given - known, node.name
        assert not given & {"args", "run", "task"}, node.name


MODULES = ["eval.py", "files.py", "runs.py", "models.py", *(f"data/{p.name}" for p in (ROOT / "data").glob("*.py"))]
PROGRAMS = [
    "benchmark.py",
    "predict.py",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "results").rglob("*.py")),
    *(f"methods/{method}.py" for method in ("naive_ft", *SIBLINGS)),
]
# Who may import whom: files <- {models, data} <- runs <- methods; eval <- {runs, benchmark}.
ARROWS = {"eval": set(), "files": set(), "data": {"files"}, "models": {"files"}}
ARROWS["runs"] = {"data", "eval", "files", "models"}
OWN = {"eval", "files", "data", "models", "runs", "benchmark", "methods"}


@pytest.mark.parametrize("file", MODULES)
def test_modules_know_no_method(file):
    """Neither by name, quoted or not, nor by a flag that only one script has."""
    text = (ROOT / file).read_text()
    for method in ["naive_ft", *SIBLINGS]:
        assert not re.search(rf"\b{method}\b", text), method
        for flag in own_flags(method):
            assert not re.search(rf"args\.{flag}\b|--{flag.replace('_', '-')}\b|['\"]{flag}['\"]", text), flag


@pytest.mark.parametrize("file", MODULES)
def test_arrows(file):
    tree, module = ast.parse((ROOT / file).read_text()), file.removesuffix(".py").partition("/")[0]
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.partition(".")[0] for name in imports} & OWN - ARROWS[module]


# Longer than 45 lines, with the reason.
LONG = {"draw": "one picture from top to bottom"}


@pytest.mark.parametrize("file", MODULES + PROGRAMS)
def test_functions_fit_on_a_screen(file):
    tree = ast.parse((ROOT / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not {node.name for node in functions if node.end_lineno - node.lineno >= 45} - set(LONG)
