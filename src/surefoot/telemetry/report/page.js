"use strict";
// What the page shows is in `data`; what the reader has chosen is in `view`; everything is drawn from these two.
const data = JSON.parse(document.getElementById("data").textContent);
const first = data.steps.first[0];
const last = data.steps.last[data.steps.last.length - 1];
const view = { low: first, high: Math.max(last, first + 1), row: null };
const byId = (id) => document.getElementById(id);
const LEFT = 62, RIGHT = 10, TOP = 10, BOTTOM = 20;

// Numbers

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return size >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
}

const whole = (value) => Math.round(value).toLocaleString("en");

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) {
    ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  }
  return ticks;
}

function logTicks(low, high) {
  const from = Math.ceil(Math.log10(low) - 1e-9), to = Math.floor(Math.log10(high) + 1e-9);
  if (to - from < 1) return niceTicks(low, high, 3).filter((tick) => tick > 0);
  const every = Math.ceil((to - from + 1) / 5);
  const parts = to - from > 1 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = from - 1; power <= to; power += 1) {
    if ((power - from) % every === 0) ticks.push(...parts.map((part) => part * 10 ** power));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

// The range of steps that everything shows

function show(low, high) {
  view.low = Math.max(first, Math.min(low, high));
  view.high = Math.min(Math.max(last, first + 1), Math.max(low, high));
  const whole_run = view.low <= first && view.high >= last;
  byId("all").hidden = whole_run;
  byId("range").textContent = whole_run ? "" : `Steps ${whole(view.low)} to ${whole(view.high)}.`;
  drawAll();
}

/** The step at a place of something `width` wide that leaves `left` to its labels; and the other way round. */
const stepAt = (x, width, left) => view.low + ((x - left) / (width - left - RIGHT)) * (view.high - view.low);
const placeOf = (step, width, left) => left + ((step - view.low) / (view.high - view.low)) * (width - left - RIGHT);

/** Let the reader drag over an element to choose steps; `mark` is told what is being chosen, and null at the end. */
function chooseSteps(element, left, mark) {
  let start = null;
  const at = (event) => {
    const box = element.getBoundingClientRect();
    const x = Math.min(Math.max(event.clientX - box.left, left()), box.width - RIGHT);
    return { x, step: stepAt(x, box.width, left()) };
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = at(event);
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (start !== null) mark(start.x, at(event).x);
  });
  element.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const end = at(event);
    if (Math.abs(end.x - start.x) > 5) show(start.step, end.step);
    start = null;
    mark(null);
  });
  element.addEventListener("pointercancel", () => { start = null; mark(null); });
  element.addEventListener("dblclick", () => show(first, last));
}

// Charts

function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (parent) parent.append(made);
  return made;
}

class Chart {
  constructor(content) {
    this.content = content;
    this.log = content.log && this.spread() > 20;
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const title = document.createElement("span");
    title.textContent = title.title = content.title;
    this.reading = document.createElement("output");
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.textContent = "log";
    this.button.addEventListener("click", () => { this.log = !this.log; this.draw(); });
    caption.append(title, this.reading, this.button);
    this.svg = svg("svg", { role: "img", "aria-label": content.title });
    this.figure.append(caption, this.svg);
    byId("charts").append(this.figure);
    chooseSteps(this.svg, () => LEFT, (from, to) => this.mark(from, to));
    this.svg.addEventListener("pointermove", (event) => pointAt(event, this.svg));
    this.svg.addEventListener("pointerleave", () => pointAt(null));
  }

  lows(line) { return line.low || line.mid; }
  highs(line) { return line.high || line.mid; }

  spread() {
    const values = this.content.lines.flatMap((line) => [...this.lows(line), ...this.highs(line)]).filter((v) => v > 0);
    return values.length ? values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)) : 1;
  }

  visible() {
    const from = data.steps.last.findIndex((step) => step >= view.low);
    let to = data.steps.first.length - 1;
    while (to > from && data.steps.first[to] > view.high) to -= 1;
    return [Math.max(0, from - 1), Math.min(data.steps.first.length - 1, to + 1)];
  }

  limits(from, to) {
    const guide = this.content.guide;
    let low = guide ?? Infinity, high = guide ?? -Infinity;
    for (const line of this.content.lines) {
      for (let i = from; i <= to; i += 1) {
        const below = this.lows(line)[i], above = this.highs(line)[i];
        if (below === null || (this.log && above <= 0)) continue;
        low = Math.min(low, this.log && below <= 0 ? above : below);
        high = Math.max(high, above);
      }
    }
    if (low > high) return [this.log ? 0.1 : 0, 1];
    if (this.log) return [low / 1.15, high * 1.15];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  }

  draw() {
    this.button.setAttribute("aria-pressed", this.log);
    this.svg.replaceChildren();
    this.width = this.svg.clientWidth;
    this.height = this.svg.clientHeight;
    const [from, to] = this.visible();
    const [low, high] = this.limits(from, to);
    const scale = this.log ? Math.log : (value) => value;
    const bottom = this.height - BOTTOM;
    this.y = (value) => bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (bottom - TOP);
    this.x = (step) => placeOf(step, this.width, LEFT);
    this.axes(low, high);
    const clip = svg("svg", { x: LEFT, y: 0, width: this.width - LEFT - RIGHT, height: bottom + 1, overflow: "hidden",
      viewBox: `${LEFT} 0 ${this.width - LEFT - RIGHT} ${bottom + 1}`, style: `height:${bottom + 1}px` }, this.svg);
    if (this.content.guide !== null) this.guide(clip);
    this.content.lines.forEach((line, index) => this.line(clip, line, index ? " second" : "", from, to));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: bottom, visibility: "hidden" }, this.svg);
    this.selection = svg("rect", { class: "selection", y: TOP, height: bottom - TOP, visibility: "hidden" }, this.svg);
  }

  axes(low, high) {
    for (const tick of this.log ? logTicks(low, high) : niceTicks(low, high, 4)) {
      if (tick < low || tick > high) continue;
      const y = this.y(tick);
      svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }, this.svg);
      svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.svg).textContent = short(tick);
    }
    for (const tick of niceTicks(view.low, view.high, Math.max(2, Math.floor(this.width / 110)))) {
      if (tick !== Math.round(tick)) continue;
      const anchor = this.x(tick) > this.width - 30 ? "end" : "middle";
      svg("text", { x: this.x(tick), y: this.height - 5, "text-anchor": anchor }, this.svg).textContent = whole(tick);
    }
  }

  guide(parent) {
    const value = this.content.guide;
    const y = this.y(value);
    svg("line", { class: "guide", x1: LEFT, x2: this.width, y1: y, y2: y }, parent);
    svg("text", { class: "guide-text", x: this.width - RIGHT - 4, y: y < TOP + 14 ? y + 13 : y - 4, "text-anchor": "end" }, parent)
      .textContent = `${short(value)} is usual`;
  }

  line(parent, line, kind, from, to) {
    const middle = (i) => this.x((data.steps.first[i] + data.steps.last[i]) / 2);
    const shown = (value) => value !== null && value !== undefined && (!this.log || value > 0);
    let path = "", above = [], below = [], pen = false, alone = [];
    const closeBand = () => {
      if (above.length) svg("path", { class: "band", d: `M${above.join("L")}L${below.reverse().join("L")}Z` }, parent);
      above = []; below = [];
    };
    for (let i = from; i <= to; i += 1) {
      const value = line.mid[i];
      if (!shown(value)) { pen = false; closeBand(); continue; }
      const x = middle(i).toFixed(1);
      path += `${pen ? "L" : "M"}${x} ${this.y(value).toFixed(1)}`;
      if (!pen && !shown(line.mid[i + 1])) alone.push([x, this.y(value)]);
      pen = true;
      if (line.low && line.high) {
        above.push(`${x} ${this.y(line.high[i]).toFixed(1)}`);
        below.push(`${x} ${this.y(shown(line.low[i]) ? line.low[i] : value).toFixed(1)}`);
      }
    }
    closeBand();
    svg("path", { class: `curve${kind}`, d: path }, parent);
    for (const [x, y] of alone) svg("circle", { class: `dot${kind}`, cx: x, cy: y, r: 2 }, parent);
    for (const i of line.broken) {
      if (i < from || i > to) continue;
      svg("line", { class: "broken", x1: middle(i), x2: middle(i), y1: TOP, y2: TOP + 14 }, parent);
    }
  }

  mark(from, to) {
    if (from === null) { this.selection.setAttribute("visibility", "hidden"); return; }
    this.selection.setAttribute("x", Math.min(from, to));
    this.selection.setAttribute("width", Math.abs(to - from));
    this.selection.setAttribute("visibility", "visible");
  }

  point(index) {
    if (index === null) {
      this.cursor.setAttribute("visibility", "hidden");
      this.reading.textContent = "";
      return;
    }
    const x = this.x((data.steps.first[index] + data.steps.last[index]) / 2);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
    const values = this.content.lines.map((line) => (line.broken.includes(index) ? "not finite" : short(line.mid[index])));
    this.reading.textContent = values.join(" and ");
  }
}

function stepText(index) {
  const from = data.steps.first[index], to = data.steps.last[index];
  return from === to ? `step ${whole(from)}` : `steps ${whole(from)} to ${whole(to)}`;
}

/** Show on every chart the point that the reader points at on one of them. */
function pointAt(event, element) {
  let index = null;
  if (event) {
    const box = element.getBoundingClientRect();
    index = nearest(stepAt(event.clientX - box.left, box.width, LEFT));
  }
  pointTo(index);
}

function pointTo(index) {
  for (const chart of charts) chart.point(index);
  byId("pointed").textContent = index === null ? "" : `Pointed at: ${stepText(index)}.`;
}

function nearest(step) {
  let low = 0, high = data.steps.first.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.steps.last[middle] < step) low = middle + 1; else high = middle;
  }
  const before = low > 0 ? step - data.steps.last[low - 1] : Infinity;
  return before < data.steps.first[low] - step ? low - 1 : low;
}

// The heat map

const ABSENT = 0, BROKEN = 1, ZERO = 2, LEAST = 3, MOST = 65535;
const COLOURS = [[24, 20, 68], [43, 60, 133], [28, 110, 152], [34, 156, 138], [118, 196, 92], [236, 222, 84], [255, 250, 214]];

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}


function valueOf(code, map) {
  return code === ZERO ? 0 : 2 ** (map.low + ((code - LEAST) / (MOST - LEAST)) * (map.high - map.low));
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const index = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[index].map((value, i) => Math.round(value + (COLOURS[index + 1][i] - value) * (place - index)));
}

function cssColour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
}

const heat = {
  canvas: byId("map"), codes: [], chosen: 0, rows: [], rowHeight: 1, top: 4,

  start() {
    this.codes = data.heat.maps.map(() => null);
    data.heat.maps.forEach((map, index) => byId("quantity").add(new Option(map.title, index)));
    byId("quantity").addEventListener("change", (event) => { this.chosen = Number(event.target.value); this.draw(); });
    byId("filter").addEventListener("input", () => this.draw());
    chooseSteps(this.canvas, () => this.gutter, (from, to) => this.mark(from, to));
    this.canvas.addEventListener("pointermove", (event) => this.tell(event));
    this.canvas.addEventListener("pointerleave", () => { byId("tip").hidden = true; pointAt(null); });
  },

  current() {
    if (this.codes[this.chosen] === null) this.codes[this.chosen] = decode(data.heat.maps[this.chosen].codes);
    return this.codes[this.chosen];
  },

  map() { return data.heat.maps[this.chosen]; },

  /** The codes between which colours run: all but the outermost hundredths. */
  range(codes) {
    const values = codes.filter((code) => code >= LEAST).sort();
    if (!values.length) return [LEAST, MOST];
    const at = (share) => values[Math.round(share * (values.length - 1))];
    const low = at(0.01), high = at(0.99);
    const octave = (MOST - LEAST) / (this.map().high - this.map().low);
    return high - low < octave ? [low - octave / 2, high + octave / 2] : [low, high];
  },

  draw() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const rows = data.heat.rows.map((name, index) => [name, index]);
    this.rows = rows.filter(([name]) => name.toLowerCase().includes(wanted));
    byId("nothing").hidden = this.rows.length > 0;
    this.canvas.hidden = this.rows.length === 0;
    if (!this.rows.length) return;
    this.rowHeight = Math.min(20, Math.max(3, Math.floor(560 / this.rows.length)));
    this.width = this.canvas.clientWidth;
    this.height = this.top + this.rows.length * this.rowHeight + BOTTOM;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.height * ratio;
    this.canvas.style.height = `${this.height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    this.gutter = Math.min(240, this.width / 4);
    this.limits = this.range(this.current());
    this.paint(context);
    this.labels(context);
    this.legend();
  },

  /** The first columns of what is drawn, a pixel wide or wider, and the end: several columns where they are narrower. */
  bins() {
    const columns = data.heat.starts.length, bins = [];
    let drawn = -Infinity;
    for (let column = 0; column < columns && this.x(data.heat.starts[column]) < this.width; column += 1) {
      if (this.x(this.end(column)) < this.gutter) continue;
      const place = Math.round(this.x(data.heat.starts[column]));
      if (place > drawn) { bins.push(column); drawn = place; }
      bins.end = column + 1;
    }
    return [...bins, bins.end ?? 0];
  },

  /** The greatest code of a row from one column to before another. */
  greatest(row, from, to) {
    const codes = this.current(), start = row * data.heat.starts.length;
    let found = ABSENT;
    for (let index = start + from; index < start + to; index += 1) {
      if (codes[index] === BROKEN) return BROKEN;
      if (codes[index] > found) found = codes[index];
    }
    return found;
  },

  x(step) { return placeOf(step, this.width, this.gutter); },
  end(column) { return column + 1 < data.heat.starts.length ? data.heat.starts[column + 1] : data.heat.last + 1; },

  paint(context) {
    const bins = this.bins(), count = bins.length - 1;
    if (count < 1) return;
    const image = new ImageData(count, this.rows.length);
    const table = { [ABSENT]: cssColour("--absent"), [BROKEN]: cssColour("--broken"), [ZERO]: [0, 0, 0] };
    this.rows.forEach(([, row], line) => {
      for (let bin = 0; bin < count; bin += 1) {
        const code = this.greatest(row, bins[bin], bins[bin + 1]);
        const rgb = table[code] || colour((code - this.limits[0]) / (this.limits[1] - this.limits[0]));
        image.data.set([...rgb, 255], 4 * (line * count + bin));
      }
    });
    const small = document.createElement("canvas");
    small.width = count;
    small.height = this.rows.length;
    small.getContext("2d").putImageData(image, 0, 0);
    const height = this.rows.length * this.rowHeight;
    context.save();
    context.beginPath();
    context.rect(this.gutter, this.top, this.width - this.gutter - RIGHT, height);
    context.clip();
    for (let bin = 0; bin < count; bin += 1) {
      const from = Math.round(this.x(data.heat.starts[bins[bin]])), to = Math.round(this.x(this.end(bins[bin + 1] - 1)));
      context.drawImage(small, bin, 0, 1, this.rows.length, from, this.top, Math.max(1, to - from), height);
    }
    context.restore();
  },

  labels(context) {
    const style = getComputedStyle(document.documentElement);
    context.fillStyle = style.getPropertyValue("--soft");
    context.font = "11px ui-monospace, Menlo, Consolas, monospace";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(12 / this.rowHeight);
    for (let line = 0; line < this.rows.length; line += every) {
      const middle = this.top + (line + 0.5) * this.rowHeight;
      context.fillText(fitting(context, this.rows[line][0], this.gutter - 8), this.gutter - 6, middle);
    }
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "alphabetic";
    for (const tick of niceTicks(view.low, view.high, Math.max(2, Math.floor(this.width / 110)))) {
      if (tick !== Math.round(tick)) continue;
      const x = this.x(tick);
      context.textAlign = x > this.width - 30 ? "right" : "center";
      context.fillText(whole(tick), x, this.height - 5);
    }
  },

  legend() {
    const legend = byId("legend");
    const strip = document.createElement("canvas");
    strip.width = 140;
    strip.height = 1;
    const context = strip.getContext("2d");
    for (let x = 0; x < 140; x += 1) {
      context.fillStyle = `rgb(${colour(x / 139)})`;
      context.fillRect(x, 0, 1, 1);
    }
    const swatch = (name, text) => {
      const square = document.createElement("i");
      square.style.background = `var(${name})`;
      return [square, text];
    };
    const [low, high] = this.limits.map((code) => short(Number(valueOf(code, this.map()).toPrecision(2))));
    legend.replaceChildren(low, strip, high, ...swatch("--broken", "inf or NaN"), ...swatch("--absent", "not measured"));
  },

  tell(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left;
    const line = Math.floor((event.clientY - box.top - this.top) / this.rowHeight);
    const step = stepAt(x, this.width, this.gutter);
    const tip = byId("tip");
    tip.hidden = !(line in this.rows) || x > this.width - RIGHT;
    if (tip.hidden) { pointAt(null); return; }
    const [name, row] = this.rows[line];
    tip.textContent = x < this.gutter ? name : `${name}\n${this.cellText(row, this.columnsAt(step))}`;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
    pointTo(x < this.gutter ? null : nearest(step));
  },

  /** The columns, from one to before another, of what is drawn at a step. */
  columnsAt(step) {
    const bins = this.bins();
    let bin = bins.length - 2;
    while (bin > 0 && data.heat.starts[bins[bin]] > step) bin -= 1;
    return [bins[bin], bins[bin + 1]];
  },

  cellText(row, [begin, end]) {
    const code = this.greatest(row, begin, end);
    const from = data.heat.starts[begin], to = this.end(end - 1) - 1;
    const steps = from === to ? `step ${whole(from)}` : `steps ${whole(from)} to ${whole(to)}, the greatest`;
    const number = () => short(Number(valueOf(code, this.map()).toPrecision(3)));
    const value = code === ABSENT ? "not measured" : code === BROKEN ? "inf or NaN" : number();
    return `${steps}: ${this.map().title} ${value}`;
  },

  mark(from, to) {
    this.draw();
    if (from === null || this.canvas.hidden) return;
    const context = this.canvas.getContext("2d");
    context.fillStyle = "rgba(128, 160, 255, 0.35)";
    context.fillRect(Math.min(from, to), this.top, Math.abs(to - from), this.rows.length * this.rowHeight);
  },
};

/** Shorten a name from the left, where names of a model are most alike. */
function fitting(context, name, width) {
  if (context.measureText(name).width <= width) return name;
  let from = 1;
  while (from < name.length && context.measureText(`…${name.slice(from)}`).width > width) from += 1;
  return `…${name.slice(from)}`;
}

// Start

function drawAll() {
  for (const chart of charts) chart.draw();
  heat.draw();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawAll();
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const charts = data.charts.map((content) => new Chart(content));
byId("charts").dataset.count = charts.length;
heat.start();
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
byId("all").addEventListener("click", () => show(first, last));
window.addEventListener("resize", drawAll);
