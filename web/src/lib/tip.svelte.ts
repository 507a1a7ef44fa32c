/** The one note beside the pointer, and beside what has the keyboard's attention. */
import { on } from "svelte/events";

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
  // Svelte's own, since an element that is taken away loses the focus in the midst of drawing, where no state may be changed.
  const stops = [
    on(element, "pointermove", move),
    on(element, "focus", focus),
    on(element, "pointerleave", hide),
    on(element, "blur", hide),
  ];
  return {
    update(next: () => string[]) {
      now = next;
    },
    destroy() {
      for (const stop of stops) stop();
      tip.hide();
    },
  };
}
