"""One Airflow DAG for each graph in a folder, as `longtake graph RECIPE --json` writes it."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable
from ray_operator import RayJob, Resolve

GRAPHS = Path(os.environ.get("LONGTAKE_GRAPHS") or Path(__file__).parent / "graphs")


def schedule(config: dict[str, Any]) -> Any:
    """The timetable of `deploy.schedule`: cron (UTC), changed assets, or both; None: started by hand."""
    clock = CronTriggerTimetable(config["cron"], timezone="UTC") if config["cron"] else None
    assets = AssetAny(*(Asset(uri) for uri in config["assets"])) if config["assets"] else None
    return AssetOrTimeSchedule(timetable=clock, assets=assets) if clock and assets else clock or assets


def build(name: str, graph: dict[str, Any]) -> DAG:
    """resolve -> the stages by the graph's edges -> report. Each stage updates the asset NAME.STAGE."""
    deploy = graph["deploy"]
    retry = {
        "retries": deploy["retries"],
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=30),
    }
    dag = DAG(
        name,
        schedule=schedule(deploy["schedule"]),
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        # two runs would train the same model twice
        max_active_runs=1,
        default_args=retry | {"trigger_rule": "none_failed"},
        tags=["longtake"],
    )
    with dag:
        resolve = Resolve(
            task_id="resolve",
            command=graph["resolve"],
            folder=f"{graph['workspace'].rstrip('/')}/recipes",
            stages=[stage["name"] for stage in graph["stages"]],
            deploy=deploy,
            execution_timeout=timedelta(hours=2),
        )
        tasks = {
            stage["name"]: RayJob(
                task_id=stage["name"],
                command=stage["command"],
                asks=stage["resources"],
                deploy=deploy,
                execution_timeout=timedelta(seconds=stage["timeout_seconds"]),
                outlets=[Asset(f"{name}.{stage['name']}")],
            )
            for stage in graph["stages"]
        }
        report = RayJob(task_id="report", command=graph["report"], deploy=deploy, execution_timeout=timedelta(hours=2))
        for upstream, downstream in graph["edges"]:
            tasks[upstream] >> tasks[downstream]
        for stage in graph["stages"]:
            if not stage["upstream"]:
                resolve >> tasks[stage["name"]]
        for task in tasks.values():
            if not task.downstream_list:
                task >> report
    return dag


for path in sorted(GRAPHS.glob("*.json")):
    try:
        globals()[path.stem] = build(path.stem, json.loads(path.read_text()))
    except Exception as e:
        raise ValueError(f"{path}: no DAG can be made of this; longtake graph RECIPE --json writes it: {e!r}") from e
