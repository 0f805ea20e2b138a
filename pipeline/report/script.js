// Comfort only: the page says all it has to say without this.
(() => {
  "use strict";
  const all = [...document.querySelectorAll("article.clip")];
  const cards = [...document.querySelectorAll(".clips article.clip")];
  if (!cards.length) return;

  // Which clips are shown.
  const rules = [...document.querySelectorAll("tr[data-rule]")];
  const make = (name, attributes = {}, ...inside) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...inside);
    return element;
  };
  const radio = (value, text) => {
    const input = make("input", { type: "radio", name: "verdict", value });
    input.checked = value === "";
    return make("label", {}, input, make("span", {}, text));
  };
  const rule = make("select", { "aria-label": "Dropped by rule" }, make("option", { value: "" }, "any rule"));
  for (const row of rules)
    rule.append(make("option", { value: row.dataset.rule }, "not " + row.querySelector("code").textContent));
  const words = make("input", { type: "search", placeholder: "name or caption", "aria-label": "Name or caption" });
  const count = make("output", {});
  const form = make(
    "form", { class: "filter", role: "search" },
    make("fieldset", { "aria-label": "Verdict" }, radio("", "all"), radio("keep", "kept"), radio("drop", "dropped")),
    rule, words, count,
  );
  const apply = () => {
    const verdict = form.elements.verdict.value;
    const wanted = words.value.trim().toLowerCase();
    const seen = new Set();
    for (const card of cards) {
      const text = wanted && card.querySelector(".words").textContent.toLowerCase();
      card.hidden =
        (verdict && card.dataset.verdict !== verdict) ||
        (rule.value && !(card.dataset.rules || "").split(" ").includes(rule.value)) ||
        (wanted && !text.includes(wanted));
      if (!card.hidden) seen.add(card.dataset.uid);
    }
    for (const sheet of document.querySelectorAll(".clips .sheet"))
      sheet.hidden = !sheet.querySelector("article.clip:not([hidden])");
    const whole = !verdict && !rule.value && !wanted;
    count.textContent = whole ? "" : seen.size + (seen.size === 1 ? " clip" : " clips");
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.querySelector(".clips").prepend(form);

  // One clip, large. Arrow keys go to its neighbors.
  const dialog = make("dialog", { "aria-label": "Clip" });
  document.body.append(dialog);
  let at = 0;
  const visible = () => all.filter((card) => !card.hidden);
  const show = (card) => {
    at = visible().indexOf(card);
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    for (const extra of copy.querySelectorAll(".open, .words b")) extra.remove();
    const details = copy.querySelector("details");
    details.replaceWith(details.querySelector("dl"));
    const button = (text, label, act) => {
      const one = make("button", { type: "button", "aria-label": label }, text);
      one.addEventListener("click", act);
      return one;
    };
    const buttons = make(
      "div", { class: "buttons" },
      button("‹", "Previous clip", () => step(-1)),
      button("›", "Next clip", () => step(1)),
      button("Close", "Close", () => dialog.close()),
    );
    dialog.replaceChildren(buttons, copy);
    if (!dialog.open) dialog.showModal();
    buttons.lastChild.focus();
  };
  const step = (by) => {
    const list = visible();
    if (list.length) show(list[(at + by + list.length) % list.length]);
  };
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  for (const card of all) {
    const name = card.querySelector(".name").textContent;
    const open = make("button", { type: "button", class: "open", "aria-label": "Look closer at " + name });
    open.addEventListener("click", () => show(card));
    card.prepend(open);
  }
  for (const link of document.querySelectorAll(".timeline a"))
    link.addEventListener("click", (event) => {
      const card = document.getElementById(link.getAttribute("href").slice(1));
      if (card && !card.hidden) {
        event.preventDefault();
        show(card);
      }
    });
})();
