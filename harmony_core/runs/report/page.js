"use strict";
// Draws the curves of the page's data and filters its samples. Fetches nothing.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = { log: false, time: false, smooth: 0, filter: "" };
  const HEIGHT = 190, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;

  const make = (name, attributes = {}, parent = null, text = null) => {
    const svg = ["svg", "path", "line", "text", "circle"].includes(name);
    const found = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    if (text !== null) found.textContent = text;
    if (parent) parent.append(found);
    return found;
  };

  // Points arrive as [step, seconds, mean] or [step, seconds, mean, low, high].
  const low = (p) => (p.length > 3 ? p[3] : p[2]);
  const high = (p) => (p.length > 3 ? p[4] : p[2]);

  const short = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  };
  const duration = (s) => {
    if (s < 120) return short(s) + " s";
    return s < 7200 ? short(s / 60) + " min" : short(s / 3600) + " h";
  };

  // Steps of 1, 2 or 5 times a power of ten.
  const ticks = (from, to, count) => {
    const rough = (to - from) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
    const found = [];
    for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  const logTicks = (from, to) => {
    const found = [];
    const every = Math.max(1, Math.ceil((to - from) / 4));
    for (let e = Math.ceil(from); e <= Math.floor(to); e += every) found.push(e);
    return found.length > 1 ? found : ticks(from, to, 3);
  };

  // An exponential moving average that does not start from zero.
  const smoothed = (points, factor) => {
    let sum = 0, weight = 0;
    return points.map((p) => {
      sum = sum * factor + p[2] * (1 - factor);
      weight = weight * factor + 1 - factor;
      return sum / weight;
    });
  };

  class Chart {
    constructor(parent, name, series) {
      this.name = name;
      this.series = series;
      this.card = make("div", { class: "chart" }, parent);
      const head = make("h3", {}, this.card);
      make("span", {}, head, name);
      const last = series[series.length - 1];
      make("span", {}, head, last.last);
      this.reading = make("div", { class: "reading" }, this.card);
      this.svg = make("svg", { height: HEIGHT, tabindex: "0", role: "img" }, this.card);
      this.svg.setAttribute("aria-label", `${name}, last value ${last.last}`);
      this.svg.addEventListener("pointermove", (event) => this.hover(event.offsetX));
      this.svg.addEventListener("pointerdown", (event) => this.hover(event.offsetX));
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
      this.at = null;
      this.rest();
    }

    // One line for each series, so that the chart below does not jump.
    read(lines) {
      this.reading.replaceChildren();
      this.series.forEach((s, n) => {
        const line = make("div", {}, this.reading);
        if (this.series.length > 1) make("b", { class: s.colour.replace("s", "k") }, line, `${s.stage} `);
        line.append(lines[n] || "\u00a0");
      });
    }

    rest() {
      this.read(this.series.map((s) => `${short(s.low)} to ${short(s.high)}${s.bad ? `, ${s.bad} not finite` : ""}`));
    }

    draw() {
      const width = Math.max(this.svg.clientWidth, 160);
      this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      this.svg.replaceChildren();
      const all = this.series.flatMap((s) => s.p);
      if (!all.length) {
        make("text", { x: LEFT, y: HEIGHT / 2 }, this.svg, "no finite value");
        return;
      }
      const log = view.log && all.some((p) => p[2] > 0);
      this.log = log;
      const kept = log ? all.filter((p) => low(p) > 0) : all;
      const used = kept.length ? kept : all.filter((p) => high(p) > 0);
      const y = (v) => (log ? Math.log10(v) : v);
      let from = Math.min(...used.map((p) => y(log && low(p) <= 0 ? high(p) : low(p))));
      let to = Math.max(...used.map((p) => y(high(p))));
      const room = to > from ? (to - from) * 0.06 : Math.abs(to) * 0.1 || 1;
      from -= room; to += room;
      const index = view.time ? 1 : 0;
      let left = Math.min(...all.map((p) => p[index]));
      let right = Math.max(...all.map((p) => p[index]));
      if (left === right) { left -= 0.5; right += 0.5; }
      this.x = (p) => LEFT + ((p[index] - left) / (right - left)) * (width - LEFT - RIGHT);
      this.y = (v) => HEIGHT - BOTTOM - ((y(v) - from) / (to - from)) * (HEIGHT - TOP - BOTTOM);
      this.axes(width, left, right, from, to);
      for (const s of this.series) this.curve(s);
      this.marks = make("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, this.svg);
      this.dots = this.series.map((s) => make("circle", { r: 3.5, class: s.colour, visibility: "hidden" }, this.svg));
    }

    axes(width, left, right, from, to) {
      const place = (v) => HEIGHT - BOTTOM - ((v - from) / (to - from)) * (HEIGHT - TOP - BOTTOM);
      for (const v of this.log ? logTicks(from, to) : ticks(from, to, 5)) {
        const at = place(v);
        make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }, this.svg);
        make("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.svg, short(this.log ? 10 ** v : v));
      }
      for (const v of ticks(left, right, Math.max(2, Math.floor(width / 60)))) {
        if (!view.time && !Number.isInteger(v)) continue;
        const at = LEFT + ((v - left) / (right - left)) * (width - LEFT - RIGHT);
        const anchor = at > width - 30 ? "end" : "middle";
        make("text", { x: at, y: HEIGHT - 6, "text-anchor": anchor }, this.svg, view.time ? duration(v) : short(v));
      }
    }

    shown(s) {
      return this.log ? s.p.filter((p) => p[2] > 0) : s.p;
    }

    curve(s) {
      const points = this.shown(s);
      const path = (ys) => points.map((p, i) => `${i ? "L" : "M"}${this.x(p).toFixed(1)} ${this.y(ys[i]).toFixed(1)}`).join("");
      const means = points.map((p) => p[2]);
      if (points.some((p) => p.length > 3)) {
        const floor = (p) => (this.log && low(p) <= 0 ? p[2] : low(p));
        const upper = points.map((p) => `${this.x(p).toFixed(1)} ${this.y(high(p)).toFixed(1)}`);
        const lower = points.map((p) => `${this.x(p).toFixed(1)} ${this.y(floor(p)).toFixed(1)}`).reverse();
        make("path", { class: `band ${s.colour}`, d: `M${[...upper, ...lower].join("L")}Z` }, this.svg);
      }
      if (view.smooth > 0) {
        make("path", { class: `raw ${s.colour}`, d: path(means) }, this.svg);
        make("path", { class: `line ${s.colour}`, d: path(smoothed(points, view.smooth)) }, this.svg);
      } else {
        make("path", { class: `line ${s.colour}`, d: path(means) }, this.svg);
      }
      if (points.length === 1) make("circle", { r: 3, class: s.colour, cx: this.x(points[0]), cy: this.y(means[0]) }, this.svg);
    }

    hover(x) {
      if (!this.dots) return;
      let best = null;
      const words = [];
      this.series.forEach((s, n) => {
        const points = this.shown(s);
        const inside = points.length && x >= this.x(points[0]) - 8 && x <= this.x(points[points.length - 1]) + 8;
        this.dots[n].setAttribute("visibility", inside ? "visible" : "hidden");
        if (!inside) return;
        const p = points.reduce((a, b) => (Math.abs(this.x(b) - x) < Math.abs(this.x(a) - x) ? b : a));
        if (best === null || Math.abs(this.x(p) - x) < Math.abs(this.x(best) - x)) best = p;
        const dot = this.dots[n];
        dot.setAttribute("cx", this.x(p));
        dot.setAttribute("cy", this.y(p[2]));
        const range = p.length > 3 ? ` (${short(p[3])} to ${short(p[4])})` : "";
        const average = view.smooth > 0 ? `, smoothed ${short(smoothed(points, view.smooth)[points.indexOf(p)])}` : "";
        words[n] = `${short(p[2])}${range}${average} at step ${p[0]}, ${duration(p[1])}`;
      });
      if (!best) return;
      this.at = this.x(best);
      this.marks.setAttribute("x1", this.at);
      this.marks.setAttribute("x2", this.at);
      this.marks.setAttribute("visibility", "visible");
      this.read(words);
    }

    key(event) {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!direction || !this.x) return;
      event.preventDefault();
      const places = this.series.flatMap((s) => this.shown(s).map((p) => this.x(p))).sort((a, b) => a - b);
      const now = this.at === null ? (direction > 0 ? -1 : Infinity) : this.at;
      const next = direction > 0 ? places.find((x) => x > now + 0.01) : places.filter((x) => x < now - 0.01).pop();
      if (next !== undefined) this.hover(next);
    }

    leave() {
      this.at = null;
      this.rest();
      for (const mark of [this.marks, ...(this.dots || [])]) if (mark) mark.setAttribute("visibility", "hidden");
    }
  }

  const charts = [];
  const drawAll = () => {
    for (const chart of charts) {
      chart.card.hidden = !chart.name.toLowerCase().includes(view.filter);
      if (!chart.card.hidden) chart.draw();
    }
  };

  const place = document.getElementById("charts");
  if (place) {
    for (const [name, series] of data.charts) charts.push(new Chart(place, name, series));
    const on = (id, event, act) => document.getElementById(id).addEventListener(event, (e) => { act(e.target); drawAll(); });
    on("log", "change", (box) => { view.log = box.checked; });
    on("time-axis", "change", (box) => { view.time = box.checked; });
    on("smooth", "input", (slider) => { view.smooth = Number(slider.value); });
    on("filter", "input", (box) => { view.filter = box.value.toLowerCase(); });
    document.getElementById("curve-controls").hidden = false;
    let width = 0;
    new ResizeObserver(() => {
      if (place.clientWidth !== width) { width = place.clientWidth; drawAll(); }
    }).observe(place);
    drawAll();
  }

  const cards = [...document.querySelectorAll(".sample")];
  const controls = document.getElementById("sample-controls");
  if (controls && cards.length > 1) {
    const choice = document.getElementById("sample-step");
    for (const step of new Set(cards.map((c) => c.dataset.step))) make("option", { value: step }, choice, step.replace(/^step /, ""));
    const order = document.getElementById("sample-order");
    const arrange = () => {
      const value = (card) => (Number.isFinite(parseFloat(card.dataset.reward)) ? parseFloat(card.dataset.reward) : 0);
      const sign = { high: -1, low: 1 }[order.value] || 0;
      const sorted = [...cards].sort((a, b) => sign * (value(a) - value(b)));
      for (const card of sorted) {
        card.hidden = choice.value !== "" && card.dataset.step !== choice.value;
        card.parentElement.append(card);
      }
    };
    choice.addEventListener("change", arrange);
    order.addEventListener("change", arrange);
    // The newest step first: all of them would fill the page.
    if (cards.length > 12) choice.value = choice.options[choice.options.length - 1].value;
    arrange();
    controls.hidden = false;
  }
})();
