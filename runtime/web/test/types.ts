// The public types, used as an app uses them: only compiled.
import * as ort from "onnxruntime-web";
import { Captioner, UsageError, readPng, type Caption } from "../index.js";

export async function caption(file: Blob): Promise<Caption> {
  const captioner = await Captioner.load("bundle/", { ort, threads: 1, verify: "sizes" });
  const found = await captioner.caption(file, { beam: 3, onToken: ({ text }) => console.log(text) });
  await captioner.caption(await readPng(new Uint8Array()), {
    signal: AbortSignal.timeout(100),
    imageSize: 256,
    tiles: false,
  });
  const { ok } = await captioner.verify();
  await captioner.close();
  if (!ok) throw new UsageError(found.text);
  return found;
}

// @ts-expect-error an option that is none
export const wrong = (captioner: Captioner) => captioner.caption(new Blob(), { beams: 3 });
