// Markup from the server, changed in place: what did not change keeps its focus, its selection and its transitions.
const OWN_CONTENT = new Set(["G-TIME", "G-CONNECTION"]);

function sameThing(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.dataset?.key === b.dataset?.key;
}

function morphAttributes(from, to) {
  for (const { name } of [...from.attributes]) {
    const kept = name === "title" && OWN_CONTENT.has(from.nodeName);
    const viewers = name === "open" && from.nodeName === "DETAILS";
    if (!to.hasAttribute(name) && !kept && !viewers) from.removeAttribute(name);
  }
  for (const { name, value } of [...to.attributes]) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
}

function morphChildren(from, to) {
  const wanted = [...to.childNodes];
  wanted.forEach((next, index) => {
    let current = from.childNodes[index];
    if (current && !sameThing(current, next) && next.dataset?.key !== undefined) {
      const found = [...from.childNodes].slice(index + 1).find((child) => sameThing(child, next));
      if (found) {
        from.insertBefore(found, current);
        current = found;
      }
    }
    if (!current) from.appendChild(next);
    else if (!sameThing(current, next)) from.replaceChild(next, current);
    else if (current.nodeType !== Node.ELEMENT_NODE) {
      if (current.nodeValue !== next.nodeValue) current.nodeValue = next.nodeValue;
    } else {
      morphAttributes(current, next);
      if (!OWN_CONTENT.has(current.nodeName)) morphChildren(current, next);
    }
  });
  while (from.childNodes.length > wanted.length) from.lastChild.remove();
}

export default {
  template: '<component :is="tag"></component>',
  props: { markup: String, tag: String },
  mounted() {
    this.$el.innerHTML = this.markup;
  },
  updated() {
    const next = document.createElement(this.tag);
    next.innerHTML = this.markup;
    morphChildren(this.$el, next);
  },
};
