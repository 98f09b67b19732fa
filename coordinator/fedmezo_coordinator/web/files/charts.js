// Curves as SVG. A point is [round, mean, smallest, largest].
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

function element(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// Round numbers that divide the range from low to high into about `count` parts.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((unit) => unit * power).find((one) => one >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) {
    found.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  }
  return found;
}

export class Chart {
  // `curves` is a list of {key, name}; `format` writes a value.
  constructor(figure, { title, curves, format, fromZero = false, wholeNumbers = false }) {
    this.curves = curves;
    this.format = format;
    this.fromZero = fromZero;
    this.wholeNumbers = wholeNumbers;
    this.title = title;
    this.data = curves.map(() => []);
    this.place = null;
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.textContent = title;
    this.output = document.createElement("output");
    caption.append(name, this.output);
    this.svg = element("svg", { tabindex: "0", role: "slider", "aria-label": title });
    figure.replaceChildren(caption);
    if (curves.length > 1) figure.append(this.legend());
    figure.append(this.svg);
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  legend() {
    const legend = document.createElement("p");
    legend.className = "legend";
    this.curves.forEach((curve, number) => {
      const item = document.createElement("span");
      const sample = element("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" });
      sample.append(element("path", { d: "M0 4H26", class: number ? "curve second" : "curve" }));
      item.append(sample, curve.name);
      legend.append(item);
    });
    return legend;
  }

  set(data) {
    this.data = data;
    this.draw();
  }

  // All rounds that have a point, for the cursor.
  rounds() {
    return [...new Set(this.data.flat().map((point) => point[0]))].sort((a, b) => a - b);
  }

  scales() {
    const points = this.data.flat();
    const box = this.svg.getBoundingClientRect();
    const width = Math.max(box.width, 120), height = Math.max(box.height, 80);
    let low = Math.min(...points.map((point) => point[2]));
    let high = Math.max(...points.map((point) => point[3]));
    if (this.fromZero) low = 0;
    if (low === high) { low -= this.fromZero ? 0 : Math.abs(low) * 0.1 || 0.1; high += Math.abs(high) * 0.1 || 0.1; }
    const space = (high - low) * 0.06;
    if (!this.fromZero) low -= space;
    high += space;
    const first = Math.min(...points.map((point) => point[0]));
    let last = Math.max(...points.map((point) => point[0]));
    if (first === last) last = first + 1;
    const x = (round) => LEFT + ((round - first) / (last - first)) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - (value - low) / (high - low)) * (height - TOP - BOTTOM);
    return { width, height, low, high, first, last, x, y };
  }

  draw() {
    const parts = [];
    const points = this.data.flat();
    const rounds = this.rounds();
    if (points.length === 0) {
      const box = this.svg.getBoundingClientRect();
      this.svg.replaceChildren(
        element("text", { x: box.width / 2, y: box.height / 2, class: "empty" }, "Nothing yet"));
      this.say(rounds);
      return;
    }
    const scale = this.scales();
    const { x, y, width, height } = scale;
    const onY = ticks(scale.low, scale.high, height > 200 ? 5 : 3)
      .filter((tick) => !this.wholeNumbers || Number.isInteger(tick));
    for (const tick of onY) {
      parts.push(element("line", { x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }));
      parts.push(element("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, this.format(tick)));
    }
    const onX = ticks(scale.first, scale.last, Math.max(4, Math.floor(width / 110)))
      .filter((tick) => Number.isInteger(tick));
    for (const tick of onX) {
      parts.push(element("text", {
        x: Math.min(x(tick), width - RIGHT), y: height - 6,
        "text-anchor": x(tick) > width - 40 ? "end" : "middle",
      }, tick.toLocaleString("en")));
    }
    this.data.forEach((curve, number) => parts.push(...this.curve(curve, number, x, y)));
    if (this.place !== null) {
      const round = rounds[Math.min(this.place, rounds.length - 1)];
      parts.push(element("line", { x1: x(round), x2: x(round), y1: TOP, y2: height - BOTTOM, class: "cursor" }));
    }
    this.svg.replaceChildren(...parts);
    this.say(rounds);
  }

  curve(points, number, x, y) {
    if (points.length === 0) return [];
    const place = number ? " second" : "";
    const parts = [];
    if (number === 0 && points.some((point) => point[2] < point[3])) {
      const above = points.map((point) => `${x(point[0]).toFixed(1)} ${y(point[3]).toFixed(1)}`);
      const below = points.map((point) => `${x(point[0]).toFixed(1)} ${y(point[2]).toFixed(1)}`);
      parts.push(element("path", { d: `M${above.join("L")}L${below.reverse().join("L")}Z`, class: "band" }));
    }
    const line = points.map((point) => `${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`);
    parts.push(element("path", { d: `M${line.join("L")}`, class: `curve${place}` }));
    if (points.length <= 40) {
      for (const point of points) {
        parts.push(element("circle", { cx: x(point[0]), cy: y(point[1]), r: 3, class: `dot${place}` }));
      }
    }
    return parts;
  }

  // Say what is under the cursor, or else what is newest.
  say(rounds) {
    if (rounds.length === 0) {
      this.output.textContent = "";
      this.svg.setAttribute("aria-valuetext", "Nothing yet");
      this.svg.setAttribute("aria-valuenow", "0");
      return;
    }
    const place = this.place === null ? rounds.length - 1 : Math.min(this.place, rounds.length - 1);
    const round = rounds[place];
    const values = this.curves.flatMap((curve, number) => {
      const points = this.data[number];
      const at = points.find((point) => point[0] >= round) ?? points.at(-1);
      if (!at) return [];
      return [`${this.curves.length > 1 ? `${curve.name} ` : ""}${this.format(at[1])}`];
    });
    const text = `round ${round.toLocaleString("en")}: ${values.join(", ")}`;
    this.output.textContent = text;
    this.svg.setAttribute("aria-valuemin", "0");
    this.svg.setAttribute("aria-valuemax", String(rounds.length - 1));
    this.svg.setAttribute("aria-valuenow", String(place));
    this.svg.setAttribute("aria-valuetext", text);
  }

  point(event) {
    const rounds = this.rounds();
    if (rounds.length === 0) return;
    const { x } = this.scales();
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    let nearest = 0;
    rounds.forEach((round, place) => {
      if (Math.abs(x(round) - at) < Math.abs(x(rounds[nearest]) - at)) nearest = place;
    });
    this.place = nearest;
    this.draw();
  }

  leave() {
    this.place = null;
    this.draw();
  }

  key(event) {
    const last = this.rounds().length - 1;
    const now = this.place ?? last;
    const steps = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
      PageDown: now - 20, PageUp: now + 20, Home: 0, End: last };
    if (last < 0 || !(event.key in steps)) return;
    event.preventDefault();
    this.place = Math.max(0, Math.min(last, steps[event.key]));
    this.draw();
  }
}
