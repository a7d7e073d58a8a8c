package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// unpack reads a tar file into a map.
func unpack(t *testing.T, content []byte) (names []string, headers map[string]*tar.Header, contents map[string][]byte) {
	t.Helper()
	headers, contents = map[string]*tar.Header{}, map[string][]byte{}
	for archive := tar.NewReader(bytes.NewReader(content)); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return names, headers, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
		headers[header.Name] = header
		if contents[header.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
}

func parse(t *testing.T, content []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatalf("%v in %s", err, content)
	}
}

func example(t *testing.T) Image {
	t.Helper()
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"program": 0o700, "certificates": 0o600} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	return Image{
		Name:         "example.org/tool:1.2",
		Architecture: "arm64",
		Files:        map[string]string{"/tool": filepath.Join(dir, "program"), "/etc/ssl/certs/all.crt": filepath.Join(dir, "certificates")},
		Entrypoint:   []string{"/tool"},
		User:         "65532:65532",
		Labels:       map[string]string{"a": "b"},
		Created:      time.Unix(1_700_000_000, 0),
	}
}

func TestArchiveIsWhatItsIndexSays(t *testing.T) {
	var out bytes.Buffer
	if err := example(t).Write(&out); err != nil {
		t.Fatal(err)
	}
	_, _, files := unpack(t, out.Bytes())
	blob := func(d descriptor) []byte {
		t.Helper()
		content, found := files[d.path()]
		if !found || digest(content) != d.Digest || int64(len(content)) != d.Size {
			t.Fatalf("%+v is not what the archive holds", d)
		}
		return content
	}

	var top index
	parse(t, files["index.json"], &top)
	if top.Manifests[0].Annotations["io.containerd.image.name"] != "example.org/tool:1.2" || top.Manifests[0].Platform.Architecture != "arm64" {
		t.Errorf("index %+v", top)
	}
	var m manifest
	parse(t, blob(top.Manifests[0]), &m)
	var config imageConfig
	parse(t, blob(m.Config), &config)
	layer := blob(m.Layers[0])
	if config.RootFS.DiffIDs[0] != digest(layer) || config.Config.User != "65532:65532" || config.Architecture != "arm64" ||
		config.Config.Labels["a"] != "b" || config.Config.Entrypoint[0] != "/tool" {
		t.Errorf("config %+v", config)
	}
	var docker []dockerManifest
	parse(t, files["manifest.json"], &docker)
	if docker[0].Config != m.Config.path() || docker[0].Layers[0] != m.Layers[0].path() || docker[0].RepoTags[0] != "example.org/tool:1.2" {
		t.Errorf("docker manifest %+v", docker)
	}

	names, headers, contents := unpack(t, layer)
	if want := []string{"etc/", "etc/ssl/", "etc/ssl/certs/", "etc/ssl/certs/all.crt", "tool"}; !slices.Equal(names, want) {
		t.Errorf("layer holds %v, want %v", names, want)
	}
	if string(contents["tool"]) != "program" || headers["tool"].Mode != 0o755 || headers["etc/ssl/certs/all.crt"].Mode != 0o644 {
		t.Errorf("layer: %+v", headers)
	}
	for name, header := range headers {
		if header.Uid != 0 || !header.ModTime.Equal(time.Unix(1_700_000_000, 0)) {
			t.Errorf("%s: owner %d, time %s", name, header.Uid, header.ModTime)
		}
	}
}

func TestSameFilesSameArchive(t *testing.T) {
	var one, two bytes.Buffer
	if err := errors.Join(example(t).Write(&one), example(t).Write(&two)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two archives of the same files differ")
	}
}

func TestRefused(t *testing.T) {
	for want, change := range map[string]func(*Image){
		"lacks a tag":         func(i *Image) { i.Name = "tool" },
		"plain absolute path": func(i *Image) { i.Files["../x"] = "/dev/null" },
		"no such file":        func(i *Image) { i.Files["/x"] = "/nonexistent" },
	} {
		image := example(t)
		change(&image)
		if err := image.Write(io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}

func TestWriteFileLeavesNothingBehindOnFailure(t *testing.T) {
	image, dir := example(t), t.TempDir()
	if err := image.WriteFile(filepath.Join(dir, "image.tar")); err != nil {
		t.Fatal(err)
	}
	image.Files["/x"] = "/nonexistent"
	if image.WriteFile(filepath.Join(dir, "other.tar")) == nil {
		t.Error("no error for a file that is not there")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "image.tar" {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
}

func TestFullName(t *testing.T) {
	for name, want := range map[string]string{
		"tool:1":                "docker.io/library/tool:1",
		"somebody/tool:1":       "docker.io/somebody/tool:1",
		"localhost/tool:1":      "localhost/tool:1",
		"localhost:5000/tool:1": "localhost:5000/tool:1",
		"example.org/a/tool:1":  "example.org/a/tool:1",
	} {
		if got := fullName(name); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}
