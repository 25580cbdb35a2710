// One training job: progress, loss, log, facts; asks again while it is not finished.

import { call, count, h, percent, poll, show, span, when } from "./dom.js";
import { progressOf, stateTag } from "./training.js";

const at = (id) => document.getElementById(id);
const id = at("job").dataset.id;

const accuracy = (counted, of) => percent((counted.both_right + counted[`only_${of}_right`]) / counted.rows);

// Of several sources of the rows that it was measured on: its accuracy on each, and its champion's.
function bySource(job) {
  const sources = Object.entries(job.result?.by_source || {});
  if (sources.length < 2) return {};
  return Object.fromEntries(sources.map(([name, counted]) => {
    const beside = [job.champion && `champion ${accuracy(counted, "champion")}`, `${count(counted.rows)} rows`];
    return [`· ${name}`, [accuracy(counted, "candidate"), beside.map((line) => line && h("div", { class: "small muted" }, line))]];
  }));
}

async function look() {
  const [job, steps, log] = await Promise.all([
    call("GET", `/api/v1/jobs/${id}`), call("GET", `/api/v1/jobs/${id}/progress`), call("GET", `/api/v1/jobs/${id}/log`)]);
  show(at("state"), stateTag(job));
  show(at("progress"), job.error ? h("p", { class: "notice bad" }, job.error) : null, progressOf(job, steps.progress));
  const box = at("log");
  const follows = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  if (box.textContent !== log) {
    box.textContent = log || "Nothing yet.";
    if (follows) box.scrollTop = box.scrollHeight;
  }
  const took = job.started && ((job.finished ? Date.parse(job.finished) : Date.now()) - Date.parse(job.started)) / 1000;
  const facts = {
    why: job.reason,
    makes: job.version,
    attempt: job.attempt > 1 ? `${job.attempt} (${job.failures} failed)` : job.attempt || null,
    "corrections that train": job.training_rows == null ? null : count(job.training_rows),
    "corrections held out": job.heldout_rows == null ? null : count(job.heldout_rows),
    "test accuracy": job.result && accuracy(job.result.test, "candidate"),
    ...bySource(job),
    started: job.started && when(job.started),
    took: took && span(took),
  };
  for (const [stage, seconds] of Object.entries(job.result?.seconds || {})) facts[`· ${stage}`] = `${seconds.toFixed(1)} s`;
  show(at("facts"), Object.entries(facts).filter(([, value]) => value != null && value !== "").flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  return job.state === "running" || job.state === "queued";
}

poll(look, at("trouble"));
