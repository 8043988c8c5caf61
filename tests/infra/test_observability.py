"""Dashboard, alerts and scrape configuration: expressions that parse, and names that are there.

How the alerts behave on data is in alerts_test.yaml, for promtool: it is no Python package, so that test is skipped
where it is not installed (Debian has it in the package prometheus).
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from jobs.stage_metrics import DONE, PLANNED
from pipelines.patch.metrics import _COUNTERS
from pipelines.train.metrics import FIGURES
from tests.infra.test_kuberay import OWN, containers
from tests.infra.tools import INFRA

OBSERVABILITY = INFRA / "observability"
DASHBOARD: dict[str, Any] = json.loads((OBSERVABILITY / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [
    rule
    for group in yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
SCRAPING = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text(encoding="utf-8"))
LABELS = {f"ray_blt_{name.replace('/', '_')}": "run" for name in FIGURES} | {
    **{f"ray_blt_patch_{name}_total": "source" for name in _COUNTERS},
    "ray_blt_patch_actor_bytes_per_second": "source",
    f"ray_{DONE}_total": "stage",
    f"ray_{PLANNED}": "stage",
    "up": "job",
}
"""Every metric, and the label that tells its series apart."""


def parsed(expression: str) -> Any:
    """With Grafana's variables as Grafana would put them in."""
    return promql_parser.parse(re.sub(r"\$__rate_interval", "1m", re.sub(r"\$(run|source|stage)\b", ".*", expression)))


def nodes(expression: str) -> Iterator[Any]:
    found: list[Any] = []
    promql_parser.walk(parsed(expression), pre_visit=found.append)
    yield from found


def check(expression: str) -> set[str]:
    """The metrics that an expression names: each exists, and no label stands in it that it does not have."""
    named = set()
    for node in nodes(expression):
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name in LABELS, node.name
            named.add(node.name)
            for matcher in node.matchers.matchers:
                assert matcher.name == LABELS[node.name], matcher
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= {"run", "source", "stage"}
    assert named
    return named


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_name_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["description"]
    for target in panel["targets"]:
        labels = {LABELS[name] for name in check(target["expr"])}
        (used,) = re.findall(r"{{(\w+)}}", target["legendFormat"]) or [None]
        assert used is None or labels == {used}
        assert f"${labels.copy().pop()}" in target["expr"], "the dashboard's choice of runs or sources"


def test_every_figure_is_shown() -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in check(target["expr"])}
    assert shown == set(LABELS) - {"up"}


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "source", "stage"]
    for name in ("run", "source", "stage"):
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables[name]["query"]).groups()  # type: ignore[union-attr]
        assert LABELS[metric] == label == name
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_name_what_there_is(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    named = check(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert promql_parser.parse_duration(rule.get("for", "1s")) < timedelta(hours=1)
    text = " ".join(rule["annotations"].values())
    labels = {LABELS[name] for name in named} | ({"instance"} if named == {"up"} else set())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
    assert any(type(node).__name__ == "BinaryExpr" for node in nodes(rule["expr"])), "something is compared"


def test_alerts_cover_what_can_go_wrong() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    wanted = {"NoProgress", "DataWait", "Restarts", "NotFinite", "Goodput"}
    assert wanted <= {name.removeprefix("BltTrain") for name in names}


def test_alerts_on_data(tmp_path: Path) -> None:
    """They fire for what they are for, and are silent on a run that goes well; a weaker threshold would be found."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    cases, rules = Path(__file__).parent / "alerts_test.yaml", OBSERVABILITY / "alerts.yaml"
    subprocess.run([promtool, "check", "rules", rules], check=True, capture_output=True)
    given = yaml.safe_load(cases.read_text(encoding="utf-8"))
    assert {case["alertname"] for case in given["tests"][0]["alert_rule_test"]} == {rule["alert"] for rule in ALERTS}
    subprocess.run([promtool, "test", "rules", cases], check=True, capture_output=True)
    weak = tmp_path / "alerts.yaml"
    weak.write_text(rules.read_text(encoding="utf-8").replace("> 0.05", "> 0.5"), encoding="utf-8")
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(given | {"rule_files": ["alerts.yaml"]}))
    found = subprocess.run(
        [promtool, "test", "rules", tmp_path / "cases.yaml"], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "BltTrainDataWait" in found.stdout + found.stderr


@pytest.mark.parametrize("wrong", ["ray_blt_train_los > 1", 'ray_blt_train_loss{source="x"} > 1'])
def test_a_wrong_name_would_be_found(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(wrong)
    with pytest.raises(ValueError, match="unclosed"):
        check("sum(ray_blt_train_loss")


def test_prometheus_finds_the_pods_and_the_rules() -> None:
    for file in SCRAPING["rule_files"]:
        assert (OBSERVABILITY / file).exists()
    pods, files = SCRAPING["scrape_configs"]
    kept = {rule["source_labels"][0]: rule["regex"] for rule in pods["relabel_configs"] if rule.get("action") == "keep"}
    (label,) = OWN
    assert kept["__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", label)] == OWN[label]
    cluster = yaml.safe_load((INFRA / "kuberay" / "base" / "cluster.yaml").read_text(encoding="utf-8"))
    ports = {port["name"] for container in containers(cluster) for port in container.get("ports", [])}
    assert set(kept["__meta_kubernetes_pod_container_port_name"].split("|")) == {p for p in ports if "metrics" in p}
    assert files["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    (up,) = [node for rule in ALERTS for node in nodes(rule["expr"]) if getattr(node, "name", None) == "up"]
    (job,) = up.matchers.matchers
    assert all(re.fullmatch(job.value, scraped["job_name"]) for scraped in (pods, files))
