"""Short runs that choose r, learning rate and targets, seeded, resumable.

Optuna proposes, a short run measures the validation loss, Optuna is told.
After a crash the same proposals are drawn again from the seed, and those
that were measured are answered from the file: the search goes on as if it
had not stopped, and no state of the sampler has to be stored.
Source: Bergstra and others 2011, "Algorithms for Hyper-Parameter
Optimization" (TPE); Bergstra and Bengio 2012 (random search).
Taught in: notebooks/19_pipeline.ipynb
"""

import json
from collections.abc import Callable

from lora_from_scratch.pipeline.settings import Search


class SearchError(ValueError):
    """The search found nothing; the message says what to change."""


def search(
    settings: Search,
    seed: int,
    measure: Callable[[dict], float],
    done: list[dict],
    remember: Callable[[list[dict]], None],
) -> tuple[dict, list[dict]]:
    """Return the best setting and one row for each trial.

    Args:
        settings: what to try.
        seed: of the proposals.
        measure: maps {"r", "lr", "target_modules"} to a validation loss;
            its RuntimeError (the run diverged) makes a failed trial.
        done: rows of an earlier call, which are not measured again.
        remember: is given all rows after each trial.

    Raises:
        SearchError: if no trial finished, or ``done`` is of another search.
    """
    import optuna

    def propose():
        trial = study.ask()
        choice = trial.suggest_categorical("target_modules", names)
        return trial, {
            "r": trial.suggest_categorical("r", settings.r),
            "lr": trial.suggest_float("lr", *settings.lr, log=True),
            "target_modules": json.loads(choice),
        }

    names = [json.dumps(t) for t in settings.target_modules]
    rows = []
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=settings.random_trials
            )
        )
        for i in range(settings.trials):
            trial, setting = propose()
            if i < len(done):
                row = done[i]
                if {k: row[k] for k in setting} != setting:
                    raise SearchError(
                        f"trial {i} on disk is not the one that seed {seed} "
                        "proposes: delete search.json to begin the search "
                        "again"
                    )
            else:
                row = {**setting, "validation_loss": None}
                try:
                    row["validation_loss"] = measure(setting)
                except RuntimeError as error:
                    row["failed"] = str(error)
            rows.append(row)
            if row["validation_loss"] is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, row["validation_loss"])
            if i >= len(done):
                remember(rows)
    finally:
        optuna.logging.set_verbosity(loud)
    finished = [row for row in rows if row["validation_loss"] is not None]
    if not finished:
        raise SearchError(
            f"none of {len(rows)} trials finished; the first failed with: "
            f"{rows[0]['failed']}. search.lr begins at {settings.lr[0]:g}: "
            "begin lower, or look at the data"
        )
    best = min(finished, key=lambda row: row["validation_loss"])
    return {k: best[k] for k in ("r", "lr", "target_modules")}, rows
