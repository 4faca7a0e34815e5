"use strict";
// The values under the mouse, read off the curves as they are drawn; all else works without this.
for (const chart of document.querySelectorAll("svg.chart")) {
  const read = chart.parentElement.querySelector("output");
  const cursor = chart.querySelector(".cursor");
  const scale = chart.dataset;
  const low = +scale.low, high = +scale.high, top = +scale.top, bottom = +scale.bottom;
  const value = (y) => {
    const share = (bottom - y) / (bottom - top);
    return scale.log ? low * Math.pow(high / low, share) : low + share * (high - low);
  };
  // A pixel of the drawing is all that is known: no more digits than it can tell apart.
  const shown = (number) => {
    const step = scale.log ? Math.abs(number) / 1000 : (high - low) / 5000;
    const digits = Math.min(12, Math.max(0, Math.ceil(-Math.log10(step))));
    return Math.abs(number) < 1e-3 && number !== 0 ? number.toExponential(3) : number.toFixed(digits);
  };
  const names = [...document.querySelectorAll(".controls label:has([id^=show-])")].map((label) => label.textContent);
  chart.addEventListener("mousemove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const group = [...chart.querySelectorAll("g[data-end]")].find((one) => getComputedStyle(one).display !== "none");
    const left = +group.dataset.left, right = +group.dataset.right;
    if (x < left || x > right) return leave();
    const texts = [];
    let nearest = x;
    for (const line of group.querySelectorAll("g.line")) {
      const path = line.querySelector("path");
      if (!path || getComputedStyle(line).display === "none") continue;
      let best = null, end = 0;
      for (const point of path.getAttribute("d").slice(1).split(/[ML]/)) {
        const [px, py] = point.split(",").map(Number);
        if (best === null || Math.abs(px - x) < Math.abs(best[0] - x)) best = [px, py];
        end = px;
      }
      if (x > end + 5) continue; // the run was over by then
      nearest = best[0];
      texts.push([names[+line.dataset.run], path.dataset.label, shown(value(best[1]))].filter(Boolean).join(" "));
    }
    const place = ((nearest - left) / (right - left)) * +group.dataset.end;
    const where = +group.dataset.end > 1000 ? Math.round(place).toLocaleString("en") : place.toPrecision(3);
    read.textContent = `${where} ${group.dataset.unit}: ${texts.slice(0, 8).join(", ")}`;
    cursor.setAttribute("x1", nearest);
    cursor.setAttribute("x2", nearest);
  });
  const leave = () => {
    read.textContent = "";
    cursor.removeAttribute("x1");
  };
  chart.addEventListener("mouseleave", leave);
}
