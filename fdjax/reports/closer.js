// The part of the report page that answers to the pointer, a finger or the keyboard. Without it the page is complete.
"use strict";

for (const section of document.querySelectorAll(".closer")) {
  const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
  section.hidden = false;
  if (data.layers.length) layers(section.querySelector(".layers"), data);
  if (data.images.length && data.blocks.length) picture(section.querySelector(".picture"), data);
}

function make(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

// A bar for each layer and way of counting. The layer that is pointed at is told, or the one that was clicked.
function layers(place, data) {
  const largest = Math.max(...data.layers.flatMap(layer => data.counts.map(count => layer[count.key])));
  const choices = make("div", { class: "choices", role: "group", "aria-label": "ways of counting" });
  const list = make("div", { class: "bars" }), told = make("div", { class: "told", "aria-live": "polite" });
  for (const count of data.counts) {
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => list.classList.toggle(`without-${count.key}`, !box.checked));
    choices.append(make("label", {}, box, make("i", { class: count.key }), count.name));
  }
  let pinned = null;
  for (const layer of data.layers) {
    const bars = data.counts.map(count => {
      const bar = make("i", { class: count.key });
      bar.style.width = `${100 * layer[count.key] / largest}%`;
      return bar;
    });
    const row = make("button", { type: "button" }, make("span", {}, layer.name), make("span", { class: "tracks" }, ...bars));
    const tell = () => {
      for (const other of list.children) other.classList.toggle("here", other === row);
      told.replaceChildren(...layerWords(layer, data.counts));
    };
    for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => { if (!pinned) tell(); });
    row.addEventListener("click", () => {
      pinned = pinned === row ? null : row;
      for (const other of list.children) other.setAttribute("aria-pressed", other === pinned);
      tell();
    });
    list.append(row);
  }
  place.append(choices, make("div", { class: "beside" }, list, told));
  list.firstChild.dispatchEvent(new Event("focus"));
}

function layerWords(layer, counts) {
  const block = layer.num_coefs > 1 ? `, ${layer.block}×${layer.block} blocks` : "";
  const form = layer.released ? `${layer.form}, released by the gate` : layer.form;
  const figures = counts.map(count => `${count.name} ${layer[count.key].toLocaleString("en")}`).join("; ");
  const words = [make("p", {}, make("strong", {}, layer.name), `: ${layer.kind}${block}, computed as ${form}.`), make("p", {}, `MACs: ${figures}.`)];
  for (const side of ["input", "output"]) {
    const kept = layer.kept_counts && layer.kept_counts[side];
    if (kept) words.push(...groups(side, kept, layer.num_coefs));
  }
  return words;
}

// The channels of a side as a strip, a piece for each kept count.
function groups(side, kept, whole) {
  const total = kept.reduce((a, b) => a + b, 0), strip = make("div", { class: "strip" });
  const said = make("p", { class: "group" });
  kept.forEach((channels, count) => {
    if (!channels) return;
    const share = whole ? count / whole : 1;
    const coefficients = count === 0 ? "nothing" : count === whole ? "everything" : count === 1 ? "the mean" : `${count} of ${whole} coefficients`;
    const words = `${side}: ${channels} of ${total} channels keep ${coefficients}.`;
    const piece = make("button", { type: "button", "aria-label": words, title: words });
    piece.style.flexGrow = channels;
    piece.style.background = `hsl(205 ${Math.round(20 + 70 * share)}% ${Math.round(88 - 58 * share)}%)`;
    const tell = () => { said.textContent = words; };
    for (const event of ["pointerenter", "focus", "click"]) piece.addEventListener(event, tell);
    strip.append(piece);
  });
  strip.lastChild.dispatchEvent(new Event("focus"));
  return [strip, said];
}

// An image through the blockwise DCT of the network: its first coefficients, and what is left of it.
function picture(place, data) {
  const image = make("select", { "aria-label": "image" }, ...data.images.map((one, i) => make("option", { value: i }, one.name)));
  const block = make("select", { "aria-label": "block" }, ...data.blocks.map(k => make("option", { value: k.block }, `${k.block}×${k.block} blocks`)));
  const kept = make("input", { type: "range", min: 0, "aria-label": "kept coefficients" });
  const said = make("p", { class: "group", "aria-live": "polite" });
  const canvases = ["the image", "its coefficients", "what is left"].map(name =>
    make("figure", {}, make("canvas", { role: "img", "aria-label": name }), make("figcaption", {}, name)));
  const draw = () => {
    const { pixels, height, width, channels } = data.images[image.value];
    const size = Number(block.value), order = data.blocks.find(k => k.block === size).order;
    const values = [], back = [], tiles = [];
    let error = 0;
    for (let c = 0; c < channels; c++) {
      const plane = Float64Array.from({ length: height * width }, (_, i) => pixels[i * channels + c]);
      const done = truncated(plane, height, width, size, order, Number(kept.value));
      values.push(plane), back.push(done.left), tiles.push(done.tiles);
      done.left.forEach((value, i) => { error += (value - plane[i]) ** 2; });
    }
    paint(canvases[0].firstChild, values, height, width);
    const mean = tiles[0].values.map((_, i) => tiles.reduce((sum, tile) => sum + tile.values[i], 0) / channels);
    const shades = mean.map(value => 255 - 60 * Math.log10(1 + Math.abs(value)));
    paint(canvases[1].firstChild, [Float64Array.from(shades)], tiles[0].height, tiles[0].width);
    paint(canvases[2].firstChild, back, height, width);
    const rms = Math.sqrt(error / (height * width * channels));
    said.textContent = `The first ${kept.value} of ${order.length} coefficients of every block; error ${rms.toFixed(1)} of 255.`;
  };
  const choose = () => {
    const whole = Number(block.value) ** 2;
    kept.max = whole;
    kept.value = Math.max(1, Math.round(whole / 4));
    draw();
  };
  image.addEventListener("change", draw);
  block.addEventListener("change", choose);
  kept.addEventListener("input", draw);
  place.append(make("div", { class: "choices" }, image, block, kept), make("div", { class: "canvases" }, ...canvases), said);
  choose();
}

// The orthonormal DCT-II of every block, as fdjax.block_dct has it: the map is padded by repeating its edge.
function truncated(plane, height, width, size, order, count) {
  const rows = Math.ceil(height / size), columns = Math.ceil(width / size);
  const wave = Array.from({ length: size }, (_, u) => Array.from({ length: size }, (_, x) =>
    Math.sqrt((u ? 2 : 1) / size) * Math.cos(Math.PI * (2 * x + 1) * u / (2 * size))));
  const left = new Float64Array(height * width);
  const tiles = { height: rows * size, width: columns * size, values: new Float64Array(rows * columns * size * size) };
  for (let r = 0; r < rows; r++) for (let s = 0; s < columns; s++) {
    const at = (y, x) => plane[Math.min(r * size + y, height - 1) * width + Math.min(s * size + x, width - 1)];
    order.forEach(([u, v], n) => {
      let coefficient = 0;
      for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) coefficient += wave[u][y] * wave[v][x] * at(y, x);
      tiles.values[(u * rows + r) * tiles.width + v * columns + s] = n < count ? coefficient : 0;
      if (n >= count) return;
      for (let y = 0; y < size && r * size + y < height; y++) for (let x = 0; x < size && s * size + x < width; x++)
        left[(r * size + y) * width + s * size + x] += coefficient * wave[u][y] * wave[v][x];
    });
  }
  return { left, tiles };
}

function paint(canvas, planes, height, width) {
  canvas.height = height, canvas.width = width;
  const context = canvas.getContext("2d"), shown = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) shown.data[4 * i + c] = Math.max(0, Math.min(255, Math.round(planes[Math.min(c, planes.length - 1)][i])));
    shown.data[4 * i + 3] = 255;
  }
  context.putImageData(shown, 0, 0);
}
