"""Gateway and inference server, interchangeable with the package that the competition ships.

A notebook imports `kaggle_evaluation.cmi_inference_server.CMIInferenceServer` and works the same
with either. What differs, always for the better, is said where it happens:

    cmi_inference_server.py  what a notebook imports
    cmi_gateway.py           the competition's test data, one recording per call
    core/templates.py        gateway loop and server life cycle, predict's traceback
    core/base_gateway.py     error classes, checks of the answers, submission.parquet, result.json
    core/relay.py            transport: own port first, loopback only off Kaggle, restartable
    core/codec.py            Python values on the wire; declared sizes checked before reading
    core/progress.py         the progress line of a local run
    metric.py                the competition's score
    dry_run.py               `python -m kaggle_evaluation.dry_run --test-dir DIR NOTEBOOK.py`

Three environment variables, all optional:

    KAGGLE_IS_COMPETITION_RERUN         Kaggle's own switch; set at all means the hidden re-run
    KAGGLE_EVALUATION_ORIGINAL_DTYPES   1: read test.csv with the original's column types
                                        0: never; unset: only in the re-run (see cmi_gateway.py)
    KAGGLE_EVALUATION_PORT              the server takes this loopback port and no other
"""
