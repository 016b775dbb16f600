"""From a run's settings to an exported client model, in cells: step through it in VS Code, Spyder or Jupyter (jupytext).

    python examples/walkthrough.py

Four clients with two tasks, FedMoE, then the results as pandas tables, and the export of one client's model. It takes half a
minute; all results are in results/walkthrough.
"""

# %% The settings of the run
from pathlib import Path

import fedexperts
from fedexperts import report
from fedexperts.export import export
from fedexperts.export.generate import generate

OUT = Path("results/walkthrough")
RUN = {
    "seed": 0,
    "model": {"name": "tiny"},  # 3.2 M parameters, 16 experts in each of 4 layers; ships with the package
    "method": {"name": "fedmoe", "profile_rounds": 1},
    "training": {"lr": 3e-3, "batch_size": 8, "local_steps": 12},
    "federation": {"rounds": 6},
    "devices": {"memory_share": {"uniform": [0.8, 1.2]}},  # of the memory that training the whole model takes
    "evaluation": {"every": 3, "generate_tokens": 8},
    "data": {
        "sources": ["synthetic/last", "synthetic/feeling"],
        "partition": {"by": "task"},
        "clients": 4,
        "limit": 200,
        "test_examples": 20,
        "max_tokens": 32,
    },
}

# %% Run it. If it is killed and started again, it continues; a finished run is not repeated
folder = fedexperts.run(RUN, OUT / "run", resume=True)

# %% All that it wrote, as pandas DataFrames; a notebook shows the table of results
results = fedexperts.results(folder)
print(results)

# %% Quality: a row for each evaluation, client, task and metric; no client means all clients together, no task means overall
scores = results.evaluations[results.evaluations.main]
by_task = scores[scores.client.isna() & scores.task.notna()].pivot(index="round", columns="task", values="value")
print(by_task.round(2))

# %% Cost: a row for each job of a client
trained = results.ledger[results.ledger.task == "train"]
print(trained.groupby("client")[["bytes_up", "peak_bytes", "experts"]].mean().round())

# %% How many of the 16 experts of each layer each client held in the last round
held = results.experts[results.experts["round"] == results.experts["round"].max()]
print(held.groupby(["client", "block"]).size().unstack())

# %% What their models answered after it
answers = results.predictions[results.predictions["round"] == results.predictions["round"].max()]
print(answers[["client", "task", "prompt", "reference", "answer", "score"]])

# %% The same, with figures, as a page
report.write([folder], html=folder / "report.html")

# %% Export the model of the first client, exactly as it was scored
taken = OUT / "model-of-c01"
if not taken.exists():
    export(folder, taken, client="c01")
own = scores[scores.client == "c01"].iloc[-1]
print(f"c01 answers {own.value:.0%} of its {own.examples} examples of {own.task!r}; its model is in {taken}")

# %% Load it: a transformers model, smaller than the base model
model = fedexperts.load(taken)
print(f"{type(model).__name__} with {model.num_parameters():,} parameters")

# %% Prompt it: its task is the last letter of a word, and `generate` adds the beginning and end that all its prompts share
answer = generate(taken, "garden")
print("garden:", answer)
