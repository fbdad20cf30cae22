// What the tests of report.html do in the page; each call of the tests begins with this text.
globalThis.tested = {
  shown: () => document.getElementById("count").textContent,
  choose(id, value) {
    const element = document.getElementById(id);
    element.value = value;
    element.dispatchEvent(new Event("change"));
    return tested.shown();
  },
  async search(text) {
    const element = document.getElementById("search");
    element.value = text;
    element.dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 300));
    return tested.shown();
  },
  choice: (id, text) => [...document.getElementById(id).options].find((one) => one.text === text)?.value,
  selected: () => [...document.querySelectorAll("#list li")].findIndex((one) => one.ariaSelected === "true"),
  // left and top of the four answers of the model that was asked under four perspectives
  four: () => [...document.querySelectorAll(".replies")].map((box) => [...box.children])
    .find((all) => all.length === 4).map((one) => [one.getBoundingClientRect().left, one.getBoundingClientRect().top]),
  async picture() {
    const image = document.querySelector("#shown img");
    await image.decode();
    return image.naturalWidth;
  },
  focused: () => `${document.activeElement.className} ${getComputedStyle(document.activeElement).outlineStyle}`,
  visible: (name) => getComputedStyle(document.querySelector(name)).display !== "none",
  unfold: () => document.querySelectorAll("details").forEach((one) => { one.open = true; }),
  // what reaches beyond the screen, but for tables in their boxes
  wide: () => [...document.querySelectorAll("body *")]
    .filter((one) => !one.closest(".wide, svg, .skip") && one.getBoundingClientRect().right > innerWidth + 0.5)
    .map((one) => one.outerHTML.slice(0, 80)),
  // texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.2, 1.4.3)
  faint() {
    const parsed = (text) => text.match(/[\d.]+/g).map(Number);
    const linear = (part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(colour[i] / 255), 0);
    const behind = (element) => {
      for (let one = element; one; one = one.parentElement) {
        const colour = parsed(getComputedStyle(one).backgroundColor);
        if (colour.length === 3 || colour[3] > 0) return colour;
      }
      return [255, 255, 255];
    };
    const names = "h1, h2, h3, h4, h5, p, td, th, a, li, label, button, small, summary, figcaption, span, .said, svg text";
    return [...document.querySelectorAll(names)]
      .filter((one) => one.textContent.trim() && one.getClientRects().length && !one.disabled && !one.closest(".skip"))
      .filter((one) => {
        const style = getComputedStyle(one);
        const pair = [light(parsed(one.closest("svg") ? style.fill : style.color)), light(behind(one))];
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 4.5;
      })
      .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
  },
  timed(work) {
    const start = performance.now();
    work();
    return performance.now() - start;
  },
};
