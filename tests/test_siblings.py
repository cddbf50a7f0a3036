"""`diff methods/naive_ft.py methods/x.py` is the method and nothing else."""

import ast
import difflib

import pytest
from conftest import ROOT

NAIVE = (ROOT / "methods" / "naive_ft.py").read_text()
SIBLINGS = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "naive_ft")
LOSS = "loss = F.cross_entropy(model(images), labels)"
STEPS = "for step in range(run.steps, epoch * args.steps_per_epoch):"
RESUME = "run.resume(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)"
COUNT = "run.step(loss, images)"
UPDATE = ["scaler.unscale_(optimizer)", "torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)"]
UPDATE += ["scaler.step(optimizer)", "scaler.update()", "scheduler.step()"]
# The lines of naive_ft's main block that a method may replace. Anything else it can only add to.
MAY_REPLACE = {
    "bn_adapt": [
        LOSS,
        'layer.train(args.bn_mode == "train")',
        "optimizer.zero_grad()",
        "scaler.scale(loss).backward()",
        *UPDATE,
    ],
    "frozen_classifier": [],
    "grad_proj": [LOSS, "optimizer.zero_grad()", "scaler.scale(loss).backward()", COUNT],
    "ht_distill": [LOSS, "run.evaluate(0, model)", "run.evaluate(epoch, model)"],
    "l2_sp": [],
    "lolsgd": [LOSS, STEPS, RESUME, "images, labels = batches(step)", COUNT],
    "lp_ft": ["run.evaluate(0, model)"],
    "masked_ft": [LOSS],
    "wise_ft": [],
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
def test_the_diff_is_short(method):
    text = (ROOT / "methods" / f"{method}.py").read_text()
    changed = [line for line in difflib.unified_diff(NAIVE.splitlines(), text.splitlines(), n=0) if line[0] in "+-"]
    assert len(changed) - 2 <= 80 and len(text.splitlines()) < 200


@pytest.mark.parametrize("method", ["naive_ft", *SIBLINGS])
def test_every_field_and_function_says_what_it_is(method):
    tree = ast.parse((ROOT / "methods" / f"{method}.py").read_text())
    header = ast.get_docstring(tree)
    assert f"python methods/{method}.py" in header and ("arXiv" in header or "KDD" in header)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields, docs = node.body[::2], node.body[1::2]
            assert len(fields) == len(docs)
            assert all(isinstance(field, ast.AnnAssign) for field in fields)
            assert all(isinstance(doc, ast.Expr) and isinstance(doc.value.value, str) for doc in docs)


MODULES = ["models.py", "eval.py", *sorted(f"data/{path.name}" for path in (ROOT / "data").glob("*.py"))]


@pytest.mark.parametrize("file", MODULES)
def test_modules_are_small_and_know_no_method(file):
    text, module = (ROOT / file).read_text(), file.removesuffix(".py").partition("/")[0]
    assert len(text.splitlines()) < {"eval.py": 808, "models.py": 390}.get(file, 300)
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", None) for node in imports
    }
    assert not names & {"methods", "benchmark", *({"data", "models"} - {module})}
    assert not [method for method in ["naive_ft", *SIBLINGS] if f'"{method}"' in text]
