/** The one note beside the pointer, and beside what has the keyboard's attention. */

class Note {
  lines = $state<string[]>([]);
  x = $state(0);
  y = $state(0);

  show(lines: string[], x: number, y: number): void {
    this.lines = lines;
    this.x = x;
    this.y = y;
  }

  hide(): void {
    this.lines = [];
  }
}

export const tip = new Note();

/** Show `lines()` while the pointer, or the keyboard, is on an element. */
export function told(element: Element, lines: () => string[]) {
  let now = lines;
  const move = (event: Event) => {
    const { clientX, clientY } = event as PointerEvent;
    tip.show(now(), clientX, clientY);
  };
  const focus = () => {
    const box = element.getBoundingClientRect();
    tip.show(now(), box.x + box.width / 2, box.y + box.height);
  };
  const hide = () => tip.hide();
  element.addEventListener("pointermove", move);
  element.addEventListener("focus", focus);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, hide);
  return {
    update(next: () => string[]) {
      now = next;
    },
    destroy() {
      element.removeEventListener("pointermove", move);
      element.removeEventListener("focus", focus);
      for (const name of ["pointerleave", "blur"]) element.removeEventListener(name, hide);
      tip.hide();
    },
  };
}
