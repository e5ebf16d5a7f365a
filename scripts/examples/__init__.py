"""Extensions of one's own, one file each: a search, a score, a policy, a model, a task and a data source.

Each is one class or function and one YAML file below ``conf/`` that names it by ``_target_``; nothing is registered.
``scripts/`` is on the path of whatever ``scripts/run.py`` starts, so that a module here is called ``examples.<file>``:

    python scripts/run.py --config-dir scripts/examples/conf +experiment=plan search=hill_climb

Copy one, or keep yours in any folder on ``PYTHONPATH``, with its YAML files wherever ``--config-dir`` points.
"""
