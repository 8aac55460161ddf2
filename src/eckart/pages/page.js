"use strict";
// What is said of a mark stands beside it at once, under the pointer and on focus.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + box.height + 24 > innerHeight ? y - box.height - 10 : y + 16}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const title of document.querySelectorAll("svg title")) {
    const mark = title.parentElement;
    const text = title.textContent;
    title.remove();
    mark.addEventListener("pointermove", (event) => show(text, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      show(text, box.right, box.bottom);
    });
    mark.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true, capture: true });
})();

// Spectra: singular values and errors of the chosen matrix on log axes, and what the rank of the slider costs.
(() => {
  const W = 720, H = 400, L = 84, R = 18, T = 14, B = 52, FLOOR = 1e-8;
  const NS = "http://www.w3.org/2000/svg"; // a name, not an address: nothing is loaded from it
  const floats = (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 4 }, (_, at) => view.getFloat32(4 * at, true));
  };
  const draw = (name, given, text) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(given)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const count = (value) => Math.round(value).toLocaleString("en-US");
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const power = (exponent) => exponent === 0 ? "1"
    : `10${[...String(exponent)].map((c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]).join("")}`;

  const start = (root) => {
    const data = JSON.parse(document.getElementById(`${root.id}-data`).textContent);
    const part = (name) => document.getElementById(`${root.id}-${name}`);
    const out = (name) => root.querySelector(`[data-out="${name}"]`);
    const [matrix, metric, slider] = ["matrix", "metric", "rank"].map(part);
    let now, marker, dots;

    const x = (rank) => L + (Math.log(rank) / Math.log(Math.max(now.count, 2))) * (W - L - R);
    const y = (value) => T + (Math.log(1.25 / value) / Math.log(1.25 / now.low)) * (H - T - B);

    const read = () => {
      const one = data.matrices[matrix.value], found = one.metrics[metric.value];
      const values = floats(found.values), errors = floats(found.errors), stops = data.stops[found.count];
      const relative = values.map((value) => found.largest ? value / found.largest : 0);
      const seen = [...relative, ...errors].filter((value) => value > FLOOR);
      const low = 10 ** Math.floor(Math.log10(Math.min(0.5, ...seen)));
      now = { one, relative, errors, stops, count: found.count, low, even: one.shape[0] * one.shape[1] / (one.shape[0] + one.shape[1]) };
    };

    const path = (values) => {
      const places = values.map((value, at) => [value, now.stops[at]]).filter(([value]) => value >= now.low);
      return places.length ? "M" + places.map(([value, rank]) => `${x(rank).toFixed(1)},${y(value).toFixed(1)}`).join("L") : "";
    };

    const axes = (svg) => {
      for (const rank of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000]) {
        if (rank > now.count) break;
        svg.append(draw("line", { x1: x(rank), x2: x(rank), y1: T, y2: H - B, class: "grid" }));
        svg.append(draw("text", { x: x(rank), y: H - B + 18, "text-anchor": "middle" }, count(rank)));
      }
      for (let exponent = 0; 10 ** exponent >= now.low * 0.999; exponent -= 1) {
        const place = y(10 ** exponent);
        svg.append(draw("line", { x1: L, x2: W - R, y1: place, y2: place, class: "grid" }));
        svg.append(draw("text", { x: L - 8, y: place + 4, "text-anchor": "end" }, power(exponent)));
      }
      svg.append(draw("line", { x1: L, x2: W - R, y1: H - B, y2: H - B, class: "axis" }));
      svg.append(draw("text", { x: (L + W - R) / 2, y: H - 12, "text-anchor": "middle", class: "title" }, "rank"));
      const middle = (T + H - B) / 2;
      svg.append(draw("text", { x: 16, y: middle, "text-anchor": "middle", class: "title", transform: `rotate(-90 16 ${middle})` }, "of the largest, of the whole"));
    };

    const redraw = () => {
      read();
      const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img" });
      svg.setAttribute("aria-label", `Spectrum of ${now.one.name}, metric ${metric.value}: singular values divided by the largest, and relative error, against rank, logarithmic axes`);
      axes(svg);
      const even = x(Math.min(Math.max(now.even, 1), now.count));
      svg.append(draw("line", { x1: even, x2: even, y1: T, y2: H - B, class: "line plain" }));
      svg.append(draw("path", { d: path(now.relative), class: "line s0" }));
      svg.append(draw("path", { d: path(now.errors), class: "line s1" }));
      marker = draw("line", { y1: T, y2: H - B, class: "axis" });
      dots = ["s0", "s1"].map((kind) => draw("circle", { r: 5, class: `mark ${kind}` }));
      svg.append(marker, ...dots);
      svg.append(draw("text", { x: even - 6, y: H - B - 8, "text-anchor": "end", class: "halo" }, `break-even ${now.even.toFixed(1)}`));
      const key = document.createElement("ul");
      key.className = "legend";
      for (const [kind, label] of [["s0", "singular value / largest"], ["s1", "relative error of the best approximation of this rank"]]) {
        const icon = draw("svg", { viewBox: "0 0 24 16", "aria-hidden": "true" });
        icon.append(draw("path", { d: "M1,8L23,8", class: `line ${kind}` }));
        const item = document.createElement("li");
        item.append(icon, label);
        key.append(item);
      }
      out("chart").replaceChildren(svg, key);
    };

    const move = () => {
      const at = Number(slider.value), rank = now.stops[at], error = now.errors[at];
      const [m, n] = now.one.shape;
      const costs = { dense: m * n, factored: rank * (m + n), pivoted: rank * (m + n - rank) };
      for (const [form, parameters] of Object.entries(costs)) {
        out(`${form}-parameters`).textContent = count(parameters);
        out(`${form}-share`).textContent = percent(parameters / costs.dense) + (parameters > costs.dense ? ", more than dense" : "");
        out(`${form}-share`).classList.toggle("more", parameters > costs.dense);
      }
      out("rank").textContent = count(rank);
      const strong = document.createElement("strong");
      strong.textContent = error.toPrecision(3);
      strong.dataset.out = "error";
      out("said").replaceChildren(`${now.one.name}, ${m} x ${n}: at rank ${count(rank)} of ${count(now.count)} the relative error is `, strong, `, and ${percent(1 - error * error)} of the energy is held (${metric.value} metric).`);
      slider.setAttribute("aria-valuetext", `rank ${rank} of ${now.count}, relative error ${error.toPrecision(3)}`);
      marker.setAttribute("x1", x(rank));
      marker.setAttribute("x2", x(rank));
      [now.relative[at], error].forEach((value, which) => {
        dots[which].setAttribute("cx", x(rank));
        dots[which].setAttribute("cy", y(Math.max(value, now.low)));
        dots[which].setAttribute("visibility", value >= now.low ? "visible" : "hidden");
      });
    };

    // Another matrix, or metric, keeps the rank where it has it.
    const choose = () => {
      const before = now && now.stops[slider.value];
      redraw();
      slider.max = now.stops.length - 1;
      const wanted = before === undefined
        ? now.errors.findIndex((error) => error * error <= 0.05)
        : now.stops.findLastIndex((rank) => rank <= before);
      slider.value = Math.max(0, wanted);
      move();
    };
    matrix.addEventListener("change", choose);
    metric.addEventListener("change", choose);
    slider.addEventListener("input", move);
    choose();
  };
  document.querySelectorAll(".spectra").forEach(start);
})();
