"""Markup of the pictures' sections, with the style and the script that they bring to the page."""

from __future__ import annotations

from string import Template

STYLE = """
.dots { display: block; width: 100%; height: auto; touch-action: manipulation; cursor: crosshair; }
.dots circle { fill-opacity: .8; }
.dots .dim circle { fill-opacity: .06; }
.dots .lit { fill-opacity: 1; stroke: var(--ink); stroke-width: 5; r: 15px; }
.legend li[data-class] { cursor: default; }
.atlas { display: none; }
.peek { position: fixed; z-index: 9; pointer-events: none; padding: 8px; border-radius: 10px;
  background: var(--panel); border: 1px solid var(--line); box-shadow: 0 4px 18px #0004; }
.peek[hidden] { display: none; }
.peek canvas { display: block; width: 96px; height: 96px; border-radius: 4px; }
.peek span { display: block; max-width: 96px; font-size: .78rem; line-height: 1.3;
  margin-top: 5px; overflow-wrap: anywhere; }
.sheet { padding: 18px; margin-bottom: 12px; display: grid; gap: 10px; overflow-x: auto; }
.sheet div { display: grid; gap: 6px; min-width: 560px;
  grid-template-columns: 1.15fr 14px repeat(var(--count), 1fr); align-items: end; }
.sheet figure { margin: 0; min-width: 0; }
.sheet img { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px;
  border: 3px solid transparent; }
.sheet .query img { border-color: var(--first); }
.sheet .wrong img { border-color: var(--wrong); }
.sheet figcaption { margin-top: 2px; font-size: .72rem; text-align: center; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.sheet .wrong figcaption { color: var(--wrong); font-weight: 600; }
.confusion { display: block; width: 100%; height: auto; font-family: var(--sans); }
.confusion text { fill: var(--ink); }
.confusion .name { fill: var(--muted); }
.confusion .cell { fill: var(--first); }
.confusion .frame { fill: none; stroke: var(--line); }
.scroll { overflow-x: auto; }
.scroll th, .scroll td { overflow-wrap: break-word; }
"""

# The nearest dot to the pointer is shown with its image, in all maps at once.
SCRIPT = """
const atlas = document.getElementById("atlas");
if (atlas) {
  const peek = document.querySelector(".peek"), canvas = peek.querySelector("canvas");
  const side = Number(atlas.dataset.side), columns = Number(atlas.dataset.columns);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  let shown = null;
  const light = (number) => {
    if (shown !== number) {
      for (const dot of document.querySelectorAll(".dots .lit")) dot.classList.remove("lit");
      if (number !== null) {
        const same = document.querySelectorAll(`.dots [data-i="${number}"]`);
        for (const dot of same) dot.classList.add("lit");
      }
    }
    shown = number;
    peek.hidden = number === null;
  };
  for (const map of document.querySelectorAll(".dots")) {
    const dots = Array.from(map.querySelectorAll("circle"));
    const at = dots.map((dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value]);
    const show = (event) => {
      const box = map.getBoundingClientRect(), scale = 1000 / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = -1, least = 40 * 40;
      at.forEach(([a, b], k) => {
        const distance = (a - x) ** 2 + (b - y) ** 2;
        if (distance < least) { least = distance; best = k; }
      });
      if (best < 0) { light(null); return; }
      const number = Number(dots[best].dataset.i);
      if (number !== shown) {
        const left = (number % columns) * side, top = Math.floor(number / columns) * side;
        pen.clearRect(0, 0, canvas.width, canvas.height);
        pen.drawImage(atlas, left, top, side, side, 0, 0, canvas.width, canvas.height);
        peek.querySelector("span").textContent = dots[best].parentNode.dataset.name;
      }
      light(number);
      const width = document.documentElement.clientWidth;
      peek.style.left = Math.max(4, Math.min(event.clientX + 18, width - 128)) + "px";
      peek.style.top = Math.max(4, event.clientY - 60) + "px";
    };
    map.addEventListener("pointermove", show);
    map.addEventListener("pointerdown", show);
    map.addEventListener("pointerleave", () => light(null));
  }
  for (const item of document.querySelectorAll(".legend li[data-class]")) {
    const dim = (on) => {
      for (const group of document.querySelectorAll(".dots g")) {
        group.classList.toggle("dim", on && group.dataset.class !== item.dataset.class);
      }
    };
    item.addEventListener("pointerenter", () => dim(true));
    item.addEventListener("pointerleave", () => dim(false));
  }
}
"""

MAPS = Template("""<section><h2>Maps of the layers</h2>
<p>$num_points test images, placed so that neighbours in a layer are neighbours here. Labels only
colour the maps; training never saw them. Clusters of one colour mean that the layer separates the
class; distances between far clusters, and their sizes, mean nothing. Point at a dot to see its
image, in every map at once; point at a class to see it alone.</p>
<img id="atlas" class="atlas" src="$atlas" alt="" data-side="$side" data-columns="$columns">
<ul class="legend">$legend</ul>
$layers
<div class="peek" hidden><canvas width="96" height="96"></canvas><span></span></div>
<h3>Images and numbers</h3><div class="pair">$mosaic
<div class="panel"><div class="scroll">$numbers</div>
<p class="note">Silhouette: how much nearer images are to their own class than to the next one, by
cosine distance (&minus;1 to 1). Effective rank: exp of the entropy of the covariance's singular
values. RankMe: the same of the features, mean included. Alignment: squared distance of two views of
an image on the unit sphere (0 to 4, small is good). Uniformity: how evenly images spread on it
(&minus;8 to 0, low is good). The last two are what the loss works on in z.</p></div></div>
</section>""")

LEGEND_ITEM = Template("""<li data-class="$number"><i style="background:$color"></i>$name</li>""")

LAYER = Template("""<h3>$name</h3><div class="pair">$maps</div>""")

MAP = Template(
    """<figure class="panel">$chart<figcaption>$method of $name.</figcaption></figure>"""
)

MOSAIC = Template("""<figure class="panel"><img class="mosaic" src="$uri" \
alt="Test images at their places in the first map">
<figcaption>The images themselves at their places in $method of $name, framed in the colour of their
class; where several fall on one place, the first is shown.</figcaption></figure>""")

RETRIEVAL = Template("""<section><h2>Nearest neighbours</h2>
<p>Test images (framed) and the $count most similar training images by cosine similarity, nearest
first. A cross and a red frame mark another class than the query's. $summary</p>
$sheets</section>""")

SHEET = Template("""<h3>$name</h3><div class="panel sheet" style="--count: $count">$rows</div>""")
SHEET_ROW = Template("""<div>$query<span></span>$found</div>""")
SHEET_IMAGE = Template("""<figure class="$kind" title="$title"><img class="pixelated" src="$uri" \
alt="$alt"><figcaption>$caption</figcaption></figure>""")

CONFUSION = Template("""<section><h2>Confusions of the linear probe</h2>
<div class="pair">
<figure class="panel">$chart
<figcaption>How the test images of each class (row) are answered (column), in % of the row; top-1
$top1 on $num_test images. $protocol</figcaption></figure>
<div class="panel"><h3>Most frequent confusions</h3><div class="scroll">$table</div></div>
</div></section>""")

SPECTRA = Template("""<section><h2>Singular spectra</h2>
<div class="pair">
<figure class="panel">$layers
<figcaption>Singular values of the covariance of each layer on the test images, divided by the
largest. A line ends where nothing varies any more: a cliff, or an end before the layer's width,
means that it has collapsed to fewer dimensions (Jing et al. 2022).</figcaption></figure>
$weights
</div></section>""")

WEIGHTS = Template("""<figure class="panel">$chart
<figcaption>Singular values of the weights of the projection head's linear layers, as they
are.</figcaption></figure>""")

PROTOCOLS = Template("""<section><h2>All protocols</h2>
<div class="pair"><div class="panel"><div class="scroll">$table</div>
<p class="note">Top-1 or the named score on the test images, in %. Minutes are of this machine,
features included where they had not been taken before; $total minutes together.</p></div>
$others</div></section>""")

TABLE = Template("""<div class="panel"><h3>$name</h3><div class="scroll">$table</div>
<p class="note">$note</p></div>""")
