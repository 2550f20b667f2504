"""Markup of the report: style, script and one template a section, with its prose.

Values reach a template through :func:`fill` only, which escapes text from outside.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from fastclr.report import picture_templates


class Markup(str):
    """HTML that this package made; any other `str` is text and gets escaped."""


def fill(template: Template, **values: object) -> Markup:
    """Put values into a template: text and numbers escaped, `Markup` as it is.

    Raises:
        KeyError: If the template has a placeholder without a value.
    """
    safe = {name: v if isinstance(v, Markup) else escape(str(v)) for name, v in values.items()}
    return Markup(template.substitute(safe))


def fill_each(template: Template, rows: Iterable[Mapping[str, object]]) -> Markup:
    """Put every row's values into a copy of the template, one after the other."""
    return Markup("".join(fill(template, **row) for row in rows))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table whose first column names the rows; no header line for an empty header."""
    names = fill_each(_HEAD_CELL, ({"text": name} for name in header))
    lines = (
        fill(_ROW, name=name, cells=fill_each(_CELL, ({"text": cell} for cell in cells)))
        for name, *cells in rows
    )
    head = f"<thead><tr>{names}</tr></thead>" if header else ""
    return Markup(f"<table>{head}<tbody>{''.join(lines)}</tbody></table>")


def page(title: str, body: Iterable[Markup]) -> str:
    """Return the whole document from its title and its sections."""
    script = _SCRIPT + picture_templates.SCRIPT
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    html = fill(
        _PAGE,
        title=title,
        style=Markup(_STYLE + picture_templates.STYLE),
        script=Markup(script),
        script_digest=digest,
        body=Markup("\n".join(body)),
    )
    # File names that are not UTF-8 arrive as lone surrogates, which no file can hold.
    return html.encode("utf-8", errors="replace").decode("utf-8")


# What charts are drawn in; also inside a chart that is a file of its own.
COLOURS = """
:root { color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f5f6f9; --panel: #fff; --ink: #171a23; --muted: #5c6373; --line: #e2e5ec;
  --first: #4a4fdc; --second: #0d9488; --third: #a4abba; --wrong: #d2344a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1117; --panel: #171b24; --ink: #e8eaf0; --muted: #9aa3b5; --line: #2a303d;
  --first: #8f96ff; --second: #2dc4b2; --third: #6b7384; --wrong: #ff7d8c; } }
"""

_STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { margin: 0 0 6px; font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15;
  letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 52px 0 14px; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 20px 0 6px; font-size: .95rem; }
p { margin: 0 0 12px; max-width: 76ch; }
.kicker { color: var(--first); font-weight: 650; font-size: .82rem; letter-spacing: .06em;
  margin: 0 0 8px; }
figcaption { color: var(--muted); }
.summary { color: var(--muted); font-size: 1.08rem; margin-bottom: 28px; overflow-wrap: anywhere; }
.panel, details { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card { padding: 15px 18px; }
.card b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 650;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .84rem; display: block; line-height: 1.4; }
.card.lead b { color: var(--first); }
.pair { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.pair > * { margin: 0; padding: 18px; min-width: 0; }
.pair > .stack { display: grid; gap: 16px; align-content: start; padding: 0; }
.stack > * { padding: 18px; min-width: 0; }
.stack h3 { margin-top: 0; }
figcaption { font-size: .88rem; line-height: 1.5; margin-top: 10px; }
.chart { display: block; width: 100%; height: auto; }
.chart * { stroke-linejoin: round; stroke-linecap: butt; }
.mosaic { display: block; width: 100%; height: auto; }
.views { display: grid; gap: 18px 32px; padding: 18px;
  grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
.views div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 5px; }
.views figure { margin: 0; }
.views figure:first-child img { outline: 2px solid var(--first); outline-offset: -2px; }
.views img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px;
  background: var(--line); }
.views figcaption { font-size: .72rem; margin-top: 2px; text-align: center; }
img.pixelated { image-rendering: pixelated; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 2px;
  padding: 0; max-height: 12rem; overflow: auto; font-size: .88rem; }
.panel.note { color: var(--ink); padding: 12px 18px; max-width: none; }
.note { color: var(--muted); font-size: .88rem; margin: 14px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 14px 0 0;
  font-size: .88rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 6px; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; }
th, td { text-align: left; padding: 8px 10px 8px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 550; font-size: .84rem; }
tbody th { font-weight: 550; }
td { font-variant-numeric: tabular-nums; }
tr:last-child > * { border-bottom: 0; }
details { padding: 0 18px; margin-bottom: 12px; }
summary { cursor: pointer; padding: 14px 0; font-weight: 600; }
details > :last-child { margin-bottom: 18px; }
details table { font-size: .86rem; }
details th { width: 50%; color: var(--muted); }
.wide { padding: 4px 18px; overflow-x: auto; }
.wide td:not(:last-child), .wide thead th { white-space: nowrap; }
.wide tbody th { min-width: 9rem; }
.study { margin: 16px 0; padding: 18px; max-width: 720px; }
.groups { columns: 2 320px; column-gap: 40px; }
.groups > div { break-inside: avoid; }
.groups h3 { margin-top: 0; padding-top: 12px; }
pre { margin: 0; padding: 16px 18px; font: .84rem/1.6 var(--mono); white-space: pre-wrap;
  overflow-wrap: anywhere; }
details pre { padding: 0; }
.command { display: flex; align-items: flex-start; gap: 8px; margin-bottom: 16px; }
.command pre { flex: 1; min-width: 0; }
button { margin: 10px 10px 10px 0; padding: 5px 14px; font: 600 .84rem var(--sans);
  cursor: pointer; color: var(--ink); background: var(--page); border: 1px solid var(--line);
  border-radius: 8px; }
"""
)

# Browsers may refuse the clipboard; the command is then selected for the keyboard.
_SCRIPT = """
for (const button of document.querySelectorAll(".command button")) {
  const code = button.previousElementSibling;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
"""

# The policy admits this one script by its digest and nothing from the network.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-$script_digest'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title · fastclr</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")

_HEAD_CELL = Template("<th>$text</th>")
_CELL = Template("<td>$text</td>")
_ROW = Template("<tr><th>$name</th>$cells</tr>")

HEADER = Template("""<p class="kicker">fastclr · SimCLR run</p>
<h1>$name</h1>
<p class="summary">$summary</p>
<div class="cards">$cards</div>""")

NOTE = Template("""<p class="panel note">$note</p>""")

CARD = Template("""<div class="panel card $kind"><span>$label</span><b>$value</b>\
<span>$detail</span></div>""")

SCORES = Template("""<section><h2>Scores of the representation h</h2>
<div class="pair">
<div class="panel">$table
<p class="note">In brackets: Wilson's 95% interval for $num_test test images. The encoder is
frozen; the untrained encoder has the same architecture with random weights, and pixels uses no
encoder: what training adds is the distance to both.</p>
<dl><dt>Linear</dt><dd>$linear</dd><dt>kNN</dt><dd>$knn</dd></dl></div>
<figure class="panel">$chart
<figcaption>Top-1 accuracy on the test images. Dotted: chance, $chance ($num_classes
classes).</figcaption></figure>
</div></section>""")

NO_SCORES = Template("""<section><h2>Scores of the representation h</h2>
<p>This run has not been evaluated. This command, with your training and test sets in place of the
dots, scores the frozen encoder with a linear classifier and kNN; the report then shows them:</p>
<div class="panel command"><pre>fastclr evaluate --run $run ...</pre>\
<button type="button">Copy</button></div></section>""")

LEARNING = Template("""<section><h2>Loss and contrastive accuracy</h2>
<div class="pair">
<figure class="panel">$loss
<figcaption>NT-Xent loss in nats at temperature $temperature. Dotted: ln(2N &minus; 1) =
$chance_loss nats, where all projections z are alike (N = $batch images a batch). Pale: every
logged step; bold: running mean.</figcaption></figure>
<figure class="panel">$accuracy
<figcaption>Contrastive accuracy: how often view 0 finds its own image among the views 1 of the
batch, by the projection z. Dotted: chance = 1 / $batch = $chance.</figcaption></figure>
</div></section>""")

EVALUATIONS = Template("""<section><h2>Online evaluation</h2>
<div class="pair">
<figure class="panel">$chart
<figcaption>Top-1 accuracy of the frozen encoder while training, on a fixed part of the labelled
images; at the end $last. Compare the points of a curve with each other, not with the final scores:
those rest on all images and a slower linear probe. Linear: $protocol$joint</figcaption></figure>
$rank
</div></section>""")

RANK = Template("""<figure class="panel">$chart
<figcaption>Effective rank of the representation h of one fixed batch of views: over how many
directions they spread, as exp of the entropy of the singular values; at the end $last. A fall
towards 1 is a collapse.</figcaption></figure>""")

# Keeps the chart beside it as wide as all others.
NO_RANK = Markup("<div></div>")

THROUGHPUT = Template("""<section><h2>Throughput and data wait</h2>
<div class="pair">
<figure class="panel">$speed
<figcaption>Source images a second over all ranks; each gives two views. The mean of the run is
$mean_speed images/s.</figcaption></figure>
<figure class="panel">$wait
<figcaption>Share of the time in which the training step waited for its batch. Near 0% the model
is the limit; if it is large, the data is: add loader threads or use a faster
back-end.</figcaption></figure>
</div></section>""")

VIEWS = Template("""<section><h2>Augmented views</h2>
<p>Each group shows a source image and two views of it, drawn independently. The encoder learns
to tell that the two belong together. Look for views that share a subject you can still name, but
differ in crop and colour: pairs without common content teach nothing, and pairs with the same
colours can be matched without looking at shapes.</p>
<div class="panel views">$groups</div></section>""")

VIEW_GROUP = Template("<div>$source$view_0$view_1</div>")
VIEW = Template("""<figure><img src="$uri" alt="$name" class="$kind">\
<figcaption>$name</figcaption></figure>""")

TSNE = Template("""<section><h2>t-SNE of the representation h</h2>
<p>$num_points test images, placed so that neighbours in h are neighbours here. Labels only colour
the picture; training never saw them. Clusters of one colour mean that h separates the class.
Distances between far clusters, and their sizes, mean nothing.</p>
<ul class="legend">$legend</ul>
<div class="pair">$mosaic<figure class="panel">$chart
<figcaption>Every image as a dot in the colour of its class.</figcaption></figure></div></section>
""")

MOSAIC = Template("""<figure class="panel"><img class="mosaic" src="$uri" \
alt="Test images at their t-SNE positions">
<figcaption>The images themselves, framed in the colour of their class; where several fall on one
place, the first is shown.</figcaption></figure>""")

LEGEND_ITEM = Template("""<li><i style="background:$color"></i>$name</li>""")

NO_TSNE = Template("""<section><h2>t-SNE of the representation h</h2>
<p>Needs the test features in the folder features of the run, which the evaluation above
writes.</p></section>""")
FEW_POINTS = Template("""<section><h2>t-SNE of the representation h</h2>
<p>Is drawn of $num_min test images or more: there are $num_points.</p></section>""")

PROVENANCE = Template("""<section><h2>How this run was made</h2>
<div class="panel command"><pre>$command</pre><button type="button">Copy</button></div>
<details><summary>Configuration</summary><div class="groups">$config</div></details>
<details><summary>DeepSpeed JSON</summary><pre>$ds_config</pre></details>
<details><summary>Versions</summary>$versions</details>
<details><summary>Hardware and time</summary>$hardware</details></section>""")

STUDIES_HEADER = Template("""<p class="kicker">fastclr · studies</p>
<h1>$title</h1>
<p class="summary">$summary</p>
<p class="panel note">$rule</p>""")

STUDY = Template("""<section><h2>$title</h2>
<p>$question</p>
<div class="panel wide">$table</div>
<figure class="panel study">$chart<figcaption>$caption</figcaption></figure>
<h3>Claims</h3>
<div class="panel wide">$claims</div>
<p class="note">$provenance</p></section>""")

GROUP = Template("<div><h3>$name</h3>$table</div>")
