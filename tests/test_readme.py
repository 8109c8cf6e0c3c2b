import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_two_commands_stand_first():
    commands = re.search(r"```\n(.*?)```", README, re.S)[1].splitlines()
    assert commands == ["pip install . && spikeclip demo", 'pip install ".[test]" && pytest']


def test_the_examples_run_and_learn():
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, scope)
    assert scope["loss"].item() < 0.4
    assert scope["probabilities"].shape == (1, 2)
