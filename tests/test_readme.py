import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_two_commands_stand_first():
    commands = re.search(r"```\n(.*?)```", README, re.S)[1].splitlines()
    assert commands == ["pip install . && spikeclip demo", 'pip install ".[test]" && pytest']


def test_the_examples_run_and_learn():
    scopes = []
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        scopes.append({})
        exec(block, scopes[-1])
    neurons, products, whole, cost = scopes
    assert neurons["loss"].item() < 0.4
    assert type(products["model"][3]).__name__ == "SpikeLinear" and type(products["model"][0]).__name__ == "Linear"
    assert whole["probabilities"].shape == (1, 2)
    assert cost["counted"].synops > 0 and cost["found"].snn.total < cost["found"].baselines["ANN fp32"].energy.total
