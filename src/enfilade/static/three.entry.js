// What room.html uses of three.js (r187, MIT licence: THREE-LICENSE). To bundle it, in a folder of its own with
// this file and THREE-LICENSE:
//   npm install three@0.187.0 esbuild@0.28.2
//   npx esbuild three.entry.js --bundle --minify --format=iife --global-name=THREE --legal-comments=none \
//     --target=es2022 --outfile=three.js
//   (echo "/*! three.js r187, bundled by esbuild"; cat THREE-LICENSE; echo "*/"; cat three.js) > three.bundle.min.js
export {
  BoxGeometry, BufferAttribute, BufferGeometry, Data3DTexture, DataTexture, DoubleSide, EdgesGeometry, LinearFilter,
  LineBasicMaterial, LineSegments, Mesh, MeshBasicMaterial, PerspectiveCamera, RedFormat, RGBAIntegerFormat, Scene,
  ShaderMaterial, SRGBColorSpace, Texture, UnsignedShortType, Vector3, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
