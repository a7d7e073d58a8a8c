// Command mkimage writes a container image that is one static program, without
// docker or any other tool. 'make image' calls it.
package main

import (
	"debug/elf"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"geminibatch.dev/devcluster/internal/image"
)

// architectures in Go's words, which are those of image formats.
var architectures = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64"}

const megabyte = 1_000_000

// pairs is a flag that may be repeated: KEY=VALUE.
type pairs map[string]string

func (p pairs) String() string { return "" }

func (p pairs) Set(text string) error {
	key, value, found := strings.Cut(text, "=")
	if !found || key == "" {
		return errors.New("must be KEY=VALUE")
	}
	p[key] = value
	return nil
}

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	result := image.Image{Files: map[string]string{}, Labels: map[string]string{}}
	flags := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	out := flags.String("out", "", "the archive to write")
	program := flags.String("program", "", "the static program; it goes to / and is the entry point")
	created := flags.Int64("created", 0, "the time of everything in the image, seconds since 1970")
	maxMegabytes := flags.Float64("max-mb", 0, "fail when the image is larger than this many megabytes")
	flags.StringVar(&result.Name, "name", "", "what the image is called: NAME:TAG")
	flags.StringVar(&result.User, "user", "65532:65532", "who the program runs as")
	flags.Var(pairs(result.Files), "file", "`PATH=FILE`: one more file in the image; may be repeated")
	flags.Var(pairs(result.Labels), "label", "`KEY=VALUE`; may be repeated")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *out == "" || *program == "" || result.Name == "" || flags.NArg() > 0 {
		return errors.New("--out, --program and --name are needed, and nothing else but flags; see --help")
	}
	var err error
	if result.Architecture, err = architecture(*program); err != nil {
		return err
	}
	inside := path.Join("/", filepath.Base(*program))
	result.Files[inside], result.Entrypoint, result.Created = *program, []string{inside}, time.Unix(*created, 0)
	if err := os.MkdirAll(filepath.Dir(*out), 0o755); err != nil {
		return err
	}
	if err := result.WriteFile(*out); err != nil {
		return err
	}
	info, err := os.Stat(*out)
	if err != nil {
		return err
	}
	size := float64(info.Size()) / megabyte
	if *maxMegabytes > 0 && size > *maxMegabytes {
		return errors.Join(fmt.Errorf("%s is %.1f MB, more than the %.0f MB allowed", result.Name, size, *maxMegabytes), os.Remove(*out))
	}
	fmt.Printf("%s: %s, linux/%s, %.1f MB\n", *out, result.Name, result.Architecture, size)
	return nil
}

// architecture tells for which machines a program is. One that needs a dynamic
// linker is refused: there is none in the image.
func architecture(program string) (string, error) {
	file, err := elf.Open(program)
	if err != nil {
		return "", fmt.Errorf("%s: %w", program, err)
	}
	defer func() { _ = file.Close() }()
	for _, header := range file.Progs {
		if header.Type == elf.PT_INTERP {
			return "", fmt.Errorf("%s is not a static program: it needs a dynamic linker", program)
		}
	}
	name, known := architectures[file.Machine]
	if !known {
		return "", fmt.Errorf("%s is for %s, which is not known here", program, file.Machine)
	}
	return name, nil
}
