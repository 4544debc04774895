// Elements made in code: text from the server is only ever a text node or an attribute, never markup.

export const $ = (id) => document.getElementById(id);

/** An element with attributes (false or null leaves one out) and listeners (onclick); children are nodes or text. */
export function el(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.setAttribute("aria-hidden", "true");
  drawing.append(use);
  return drawing;
}

export const whole = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });

export const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;

/** Three significant places or three decimals, whichever is shorter to read. */
export const brief = (number) => (Math.abs(number) < 100 ? number.toFixed(3) : number.toPrecision(4));

/** The server's messages have no capital and no full stop. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
